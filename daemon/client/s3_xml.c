/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * S3's XML: errors, pages of listings, results of deletions, and the body of a deletion. Pure.
 *
 * Whatever a server sends, work and memory are bounded by the length of what it sent: no document
 * type (so no entities to blow up), no deeper than DEPTH_MAX, no text longer than TEXT_MAX.
 */
#include <errno.h>
#include <expat.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/ascii.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

enum { DEPTH_MAX = 8, NAME_MAX_LEN = 40, TEXT_MAX = 8192 };

/* One document that is being read. */
struct doc {
	XML_Parser parser;
	char names[DEPTH_MAX][NAME_MAX_LEN + 1]; /* of the open elements */
	unsigned depth;
	char text[TEXT_MAX + 1]; /* of the innermost element, so far */
	size_t text_len;
	bool is_bad;
	/* An element ended: its path is in names, its text in text. */
	void (*end)(struct doc *d);
	void *arg;
};

static void stop(struct doc *d)
{
	d->is_bad = true;
	(void)XML_StopParser(d->parser, XML_FALSE); /* fails only if it has stopped already */
}

static void on_start(void *arg, const char *name, const char **attributes)
{
	struct doc *d = arg;

	if (d->depth == DEPTH_MAX) {
		stop(d);
		return;
	}
	(void)snprintf(d->names[d->depth++], NAME_MAX_LEN + 1, "%s", name);
	d->text_len = 0;
}

static void on_text(void *arg, const char *text, int len)
{
	struct doc *d = arg;

	if (d->text_len + (size_t)len > TEXT_MAX) {
		stop(d);
		return;
	}
	memcpy(d->text + d->text_len, text, (size_t)len);
	d->text_len += (size_t)len;
}

static void on_end(void *arg, const char *name)
{
	struct doc *d = arg;

	if (d->is_bad)
		return;
	d->text[d->text_len] = '\0';
	d->end(d);
	d->depth--;
	d->text_len = 0;
}

static void on_doctype(void *arg, const char *name, const char *system, const char *public,
		       int has_internal)
{
	stop(arg);
}

/* Is the element that ends at this depth, under these parents? NULL ends the list. */
static bool is_path(const struct doc *d, const char *a, const char *b, const char *c)
{
	const char *const want[] = { a, b, c };
	unsigned n = c ? 3 : b ? 2 : 1;

	if (d->depth != n)
		return false;
	for (unsigned i = 0; i < n; i++) {
		if (strcmp(d->names[i], want[i]) != 0)
			return false;
	}
	return true;
}

/*
 * Reads `text`, calling `end` for each element. -EPROTO when it is not XML, or has not the root
 * `root`.
 */
static int read_doc(const char *text, size_t len, const char *root, void (*end)(struct doc *),
		    void *arg)
{
	struct doc *d = calloc(1, sizeof(*d));
	int rc = -EPROTO;

	if (!d)
		return -ENOMEM;
	d->parser = XML_ParserCreate(NULL);
	d->end = end;
	d->arg = arg;
	if (!d->parser) {
		rc = -ENOMEM;
	} else if (len <= HTTP_TEXT_MAX) {
		XML_SetUserData(d->parser, d);
		XML_SetElementHandler(d->parser, on_start, on_end);
		XML_SetCharacterDataHandler(d->parser, on_text);
		XML_SetStartDoctypeDeclHandler(d->parser, on_doctype);
		if (XML_Parse(d->parser, text, (int)len, XML_TRUE) == XML_STATUS_OK && !d->is_bad &&
		    strcmp(d->names[0], root) == 0)
			rc = 0;
	}
	if (d->parser)
		XML_ParserFree(d->parser);
	free(d);
	return rc;
}

/* ---- errors ---- */

/* For a log line: cut to fit, no control characters. */
static void copy_clean(char *out, size_t room, const char *text)
{
	size_t i;

	for (i = 0; text[i] && i + 1 < room; i++)
		out[i] = (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? ' ' : text[i];
	out[i] = '\0';
}

static void error_end(struct doc *d)
{
	struct s3_error *e = d->arg;

	if (is_path(d, "Error", "Code", NULL))
		copy_clean(e->code, sizeof(e->code), d->text);
	else if (is_path(d, "Error", "Message", NULL))
		copy_clean(e->message, sizeof(e->message), d->text);
	else if (is_path(d, "Error", "Region", NULL))
		copy_clean(e->region, sizeof(e->region), d->text);
}

void s3_xml_error(const char *text, size_t len, struct s3_error *out)
{
	*out = (struct s3_error){ 0 };
	if (!text || read_doc(text, len, "Error", error_end, out) != 0)
		*out = (struct s3_error){ 0 };
}

/* ---- listings ---- */

struct item {
	char *key, *etag;
	uint64_t size;
};

struct listing {
	struct s3_page *page;
	struct item *items;
	unsigned n, room;
	char *key, *etag; /* of the Contents that is open */
	uint64_t size;
	bool has_size, is_encoded;
	int rc;
};

/*
 * encoding-type=url, in place: "+" is a blank to some servers, and all write %2B for a plus.
 * -EPROTO for a %00.
 */
static int decode(char *text)
{
	char *out = text;

	for (const char *p = text; *p; p++) {
		int byte = ascii_percent(p);

		if (byte == 0)
			return -EPROTO;
		if (byte > 0) {
			*out++ = (char)byte;
			p += 2;
		} else {
			*out++ = *p == '+' ? ' ' : *p;
		}
	}
	*out = '\0';
	return 0;
}

static int take_text(const struct doc *d, char **out)
{
	free(*out);
	*out = strdup(d->text);
	return *out ? 0 : -ENOMEM;
}

/* Without its quotes. Weak ones, and what could not stand in a header, are as none. */
static int take_etag(struct doc *d, char **out)
{
	if (d->text_len >= 2 && d->text[0] == '"' && d->text[d->text_len - 1] == '"') {
		d->text[d->text_len - 1] = '\0';
		memmove(d->text, d->text + 1, d->text_len - 1);
	}
	for (const char *c = d->text; *c; c++)
		if (*c <= ' ' || *c > '~' || *c == '"')
			return 0;
	return strncmp(d->text, "W/", 2) == 0 ? 0 : take_text(d, out);
}

/* Takes the Contents that has just ended. */
static int add_item(struct listing *l)
{
	if (!l->key || !l->has_size)
		return -EPROTO;
	if (l->n == l->room) {
		unsigned room = MAX(2 * l->room, 64U);
		struct item *items = realloc(l->items, room * sizeof(*items));

		if (!items)
			return -ENOMEM;
		l->items = items;
		l->room = room;
	}
	l->items[l->n++] = (struct item){ TAKE_PTR(l->key), TAKE_PTR(l->etag), l->size };
	l->has_size = false;
	return 0;
}

static void list_end(struct doc *d)
{
	static const char root[] = "ListBucketResult";
	struct listing *l = d->arg;
	int rc = 0;

	if (is_path(d, root, "Contents", "Key")) {
		rc = take_text(d, &l->key);
	} else if (is_path(d, root, "Contents", "Size")) {
		rc = parse_u64(d->text, &l->size) != 0 ? -EPROTO : 0;
		l->has_size = !rc;
	} else if (is_path(d, root, "Contents", "ETag")) {
		rc = take_etag(d, &l->etag);
	} else if (is_path(d, root, "Contents", NULL)) {
		rc = add_item(l);
	} else if (is_path(d, root, "IsTruncated", NULL)) {
		l->page->is_truncated = strcmp(d->text, "true") == 0;
	} else if (is_path(d, root, "NextContinuationToken", NULL)) {
		rc = take_text(d, &l->page->token);
	} else if (is_path(d, root, "EncodingType", NULL)) {
		l->is_encoded = strcmp(d->text, "url") == 0;
	}
	if (rc) {
		l->rc = rc;
		stop(d);
	}
}

int s3_xml_list(const char *text, size_t len, struct s3_page *page, s3_key_fn *fn, void *arg)
{
	struct listing l = { .page = page };
	int rc;

	*page = (struct s3_page){ 0 };
	rc = read_doc(text, len, "ListBucketResult", list_end, &l);
	if (l.rc)
		rc = l.rc;
	if (!rc && page->is_truncated && (!page->token || !*page->token))
		rc = -EPROTO; /* it would begin again, for ever */
	for (unsigned i = 0; i < l.n; i++) {
		if (!rc && l.is_encoded)
			rc = decode(l.items[i].key);
		if (!rc)
			rc = fn(arg, l.items[i].key, l.items[i].size,
				l.items[i].etag ? l.items[i].etag : "");
		free(l.items[i].key);
		free(l.items[i].etag);
	}
	page->keys = l.n;
	free(l.key);
	free(l.etag);
	free(l.items);
	return rc;
}

/* ---- deletions ---- */

struct undeleted {
	char key[3 * S3_KEY_MAX + 1], code[64], message[192];
	s3_undeleted_fn *fn;
	void *arg;
};

static void deleted_end(struct doc *d)
{
	struct undeleted *u = d->arg;

	if (is_path(d, "DeleteResult", "Error", "Key")) {
		copy_clean(u->key, sizeof(u->key), d->text);
	} else if (is_path(d, "DeleteResult", "Error", "Code")) {
		copy_clean(u->code, sizeof(u->code), d->text);
	} else if (is_path(d, "DeleteResult", "Error", "Message")) {
		copy_clean(u->message, sizeof(u->message), d->text);
	} else if (is_path(d, "DeleteResult", "Error", NULL)) {
		u->fn(u->arg, u->key, u->code, u->message);
		u->key[0] = u->code[0] = u->message[0] = '\0';
	}
}

int s3_xml_deleted(const char *text, size_t len, s3_undeleted_fn *fn, void *arg)
{
	struct undeleted *u = calloc(1, sizeof(*u));
	int rc;

	if (!u)
		return -ENOMEM;
	u->fn = fn;
	u->arg = arg;
	rc = read_doc(text ? text : "", len, "DeleteResult", deleted_end, u);
	free(u);
	return rc;
}

enum { ESCAPED_MAX = 6 }; /* "&quot;" */

static char *add_text(char *out, const char *text)
{
	size_t len = strlen(text);

	memcpy(out, text, len);
	return out + len;
}

static char *add_escaped(char *out, const char *text)
{
	for (; *text; text++) {
		switch (*text) {
		case '&': out = add_text(out, "&amp;"); break;
		case '<': out = add_text(out, "&lt;"); break;
		case '>': out = add_text(out, "&gt;"); break;
		case '"': out = add_text(out, "&quot;"); break;
		case '\'': out = add_text(out, "&apos;"); break;
		default: *out++ = *text;
		}
	}
	return out;
}

int s3_xml_delete(const char *prefix, const struct obj *objs, unsigned n, char **out, size_t *len)
{
	static const char head[] = "<Delete><Quiet>true</Quiet>", tail[] = "</Delete>";
	static const char before[] = "<Object><Key>", after[] = "</Key></Object>";
	size_t room = sizeof(head) + sizeof(tail);
	char *text, *p;

	for (unsigned i = 0; i < n; i++)
		room += sizeof(before) + sizeof(after) +
			ESCAPED_MAX * (strlen(prefix) + objs[i].len);
	text = malloc(room);
	if (!text)
		return -ENOMEM;
	p = add_text(text, head);
	for (unsigned i = 0; i < n; i++) {
		p = add_text(p, before);
		p = add_escaped(p, prefix);
		p = add_escaped(p, objs[i].name);
		p = add_text(p, after);
	}
	p = add_text(p, tail);
	*out = text;
	*len = (size_t)(p - text);
	return 0;
}
