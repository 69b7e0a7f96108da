/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Opening of layers http and https: the URL, the file of headers, and the first request, which tells early what is
 * wrong with address, name, access or server, and pins the object.
 *
 * That first request asks for one byte. Its answer shows all there is to know: that the server has ranges (a 206), the
 * size (Content-Range) and what the object is known by (ETag, Last-Modified). HEAD would show less, and some servers
 * refuse it; it is sent only if the range came without a total.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "layer/http/http_object.h"
#include "layer/http/http_options.h"
#include "nbdrs/ascii.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/reactor.h"
#include "nbdrs/spec.h"

enum { TRIES = 4, HEADER_FILE_MAX = 64 << 10, USERINFO_MAX = 1024 };

#define FIRST_PAUSE_NS UINT64_C(200000000)
#define PAUSE_MAX_NS   UINT64_C(10000000000)

const struct opt object_options[] = {
	{ .name = "header_file",
	  .type = OPT_STR,
	  .field = offsetof(struct object, header_file),
	  .help = "file with headers to send, one 'Name: value' in a line" },
	HTTP_OPTIONS(struct object),
	OPT_END,
};

static void free_secret(char *text)
{
	if (text != NULL)
		explicit_bzero(text, strlen(text));
	free(text);
}

void object_free(struct object *o)
{
	http_free(o->http);
	free_secret(o->url); /* its query may be a signature */
	free(o->shown);
	free_secret(o->basic);
	free_secret(o->header_text);
	o->http = NULL;
	o->url = o->shown = o->basic = o->header_text = NULL;
	o->headers_n = 0;
}

/* ---- the URL ---- */

/* Undoes percent-encoding of text[0, len) at `out`, which has room. The length; -EINVAL also for control characters. */
static int decode(const char *text, size_t len, char *out)
{
	size_t n = 0;

	for (size_t i = 0; i < len; i++) {
		char c = text[i];

		if (c == '%') {
			int byte = i + 2 < len ? ascii_percent(text + i) : -1;

			if (byte < 0)
				return -EINVAL;
			c = (char)byte;
			i += 2;
		}
		if ((unsigned char)c < 0x20 || c == 0x7f)
			return -EINVAL;
		out[n++] = c;
	}
	return (int)n;
}

static char *base64(const char *prefix, const char *data, size_t len)
{
	static const char digits[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	char *out = malloc(strlen(prefix) + (len + 2) / 3 * 4 + 1);
	size_t n;

	if (out == NULL)
		return NULL;
	n = (size_t)(stpcpy(out, prefix) - out);
	for (size_t i = 0; i < len; i += 3) {
		uint32_t v = (uint32_t)(uint8_t)data[i] << 16;

		v |= i + 1 < len ? (uint32_t)(uint8_t)data[i + 1] << 8 : 0;
		v |= i + 2 < len ? (uint32_t)(uint8_t)data[i + 2] : 0;
		out[n++] = digits[v >> 18];
		out[n++] = digits[v >> 12 & 63];
		out[n++] = i + 1 < len ? digits[v >> 6 & 63] : '=';
		out[n++] = i + 2 < len ? digits[v & 63] : '=';
	}
	out[n] = '\0';
	return out;
}

/* "user:password", percent-encoded, to the value of Authorization (RFC 7617). */
static int make_basic(const char *scheme, const char *text, size_t len, char **basic,
		      struct err *err)
{
	const char *colon = memchr(text, ':', len);
	size_t user_len = colon ? (size_t)(colon - text) : len;
	char plain[USERINFO_MAX + 2];
	int user, password = 0;

	if (len > USERINFO_MAX)
		return err_set(err, -EINVAL, "%s: user and password are too long, at most %d bytes",
			       scheme, USERINFO_MAX);
	user = decode(text, user_len, plain);
	if (user < 0 || memchr(plain, ':', (size_t)user))
		return err_set(err, -EINVAL,
			       "%s: the user in the URL is no good: it must not hold \":\" or "
			       "control characters, and \"%%\" must be written %%25",
			       scheme);
	plain[user++] = ':';
	if (colon)
		password = decode(colon + 1, len - user_len - 1, plain + user);
	if (password >= 0)
		*basic = base64("Basic ", plain, (size_t)(user + password));
	explicit_bzero(plain, sizeof(plain));
	if (password < 0)
		return err_set(err, -EINVAL,
			       "%s: the password in the URL is no good: it must not hold control "
			       "characters, and \"%%\" must be written %%25",
			       scheme);
	return *basic ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* The name of the object in a folder; "" where the path names it. The caller frees. */
static int name_in_folder(const char *scheme, const char *path, size_t path_len,
			  const char *export_name, char **name, struct err *err)
{
	struct obj obj;

	if (path_len > 0 && path[path_len - 1] != '/') {
		*name = strdup("");
	} else {
		if (export_name == NULL || export_name[0] == '\0')
			return err_set(err, -EINVAL,
				       "%s: the URL is a folder; name the object in it, as in "
				       "%s://host/disk.img",
				       scheme, scheme);
		if (obj_set(&obj, export_name) != 0)
			return err_set(err, -EINVAL,
				       "%s: the export's name '%s' cannot be an object in a folder "
				       "(no \"/\", \".\" or \"..\"); name the object itself",
				       scheme, export_name);
		*name = percent_encode(export_name);
	}
	return *name ? 0 : err_set(err, -ENOMEM, "out of memory");
}

int object_parse_url(const char *scheme, const char *target, const char *export_name, char **url,
		     char **basic, struct err *err)
{
	const char *host = target + 2, *path, *query, *at;
	_cleanup_free_ char *name = NULL;
	size_t path_len;
	int rc;

	if (strncmp(target, "//", 2) != 0)
		return err_set(err, -EINVAL, "%s: needs a URL, as in %s://host/disk.img", scheme,
			       scheme);
	for (const char *c = target; *c; c++)
		if ((unsigned char)*c <= 0x20 || *c == 0x7f || *c == '#')
			return err_set(err, -EINVAL,
				       "%s: the URL has a blank, a control character or a \"#\" in "
				       "it; percent-encode it (%%20, %%23)",
				       scheme);
	path = host + strcspn(host, "/?");
	query = path + strcspn(path, "?");
	path_len = (size_t)(query - path);
	at = memrchr(host, '@', (size_t)(path - host));
	if ((at ? at + 1 : host) == path)
		return err_set(err, -EINVAL,
			       "%s: the URL has no host in it, as in %s://host/disk.img", scheme,
			       scheme);
	rc = name_in_folder(scheme, path, path_len, export_name, &name, err);
	if (rc == 0 && at)
		rc = make_basic(scheme, host, (size_t)(at - host), basic, err);
	if (rc != 0)
		return rc;
	host = at ? at + 1 : host;
	if (asprintf(url, "%s://%.*s%s%s%s", scheme, (int)(query - host), host, path_len ? "" : "/",
		     name, query) < 0) {
		*url = NULL;
		return err_set(err, -ENOMEM, "out of memory");
	}
	return 0;
}

/* ---- headers ---- */

struct file_job {
	const char *path;
	char *text;
	struct err *err;
};

/* Blocks: for offload(). */
static int read_headers(void *arg)
{
	struct file_job *j = arg;
	_cleanup_close_ int fd = open(j->path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	ssize_t n;

	if (fd < 0)
		return err_set(j->err, -errno, "cannot open header_file %s: %s", j->path,
			       strerror(errno));
	j->text = calloc(1, HEADER_FILE_MAX + 1);
	if (j->text == NULL)
		return err_set(j->err, -ENOMEM, "out of memory");
	for (size_t len = 0; len < HEADER_FILE_MAX; len += (size_t)n) {
		n = read(fd, j->text + len, HEADER_FILE_MAX - len);
		if (n < 0)
			return err_set(j->err, -errno, "cannot read header_file %s: %s", j->path,
				       strerror(errno));
		if (n == 0)
			return 0;
	}
	return err_set(j->err, -EFBIG, "header_file %s is too long, less than %d bytes will do",
		       j->path, HEADER_FILE_MAX);
}

static bool is_ours(const char *name)
{
	static const char *const names[] = {
		"Range",           "If-Range",          "Content-Length",
		"Accept-Encoding", "Transfer-Encoding", "Connection"
	};

	for (unsigned i = 0; i < ARRAY_LEN(names); i++)
		if (strcasecmp(name, names[i]) == 0)
			return true;
	return false;
}

static int bad_line(const struct object *o, unsigned line, const char *why, struct err *err)
{
	return err_set(err, -EINVAL, "header_file %s, line %u: %s", o->header_file, line, why);
}

/* Takes one line apart, in place. */
static int take_header(struct object *o, char *text, unsigned line, struct err *err)
{
	size_t len = strlen(text);
	char *colon, *value;

	while (len > 0 && isspace((unsigned char)text[len - 1]))
		text[--len] = '\0';
	if (len == 0 || text[0] == '#')
		return 0;
	colon = strchr(text, ':');
	if (colon == NULL || colon == text)
		return bad_line(o, line, "no 'Name: value'", err);
	*colon = '\0';
	value = colon + 1 + strspn(colon + 1, " \t");
	if (text[strcspn(text, " \t\"(),/;<=>?@[\\]{}")] != '\0')
		return bad_line(o, line,
				"the name of the header has characters that no name may have", err);
	for (const char *c = text; *c; c++)
		if ((unsigned char)*c < 0x21 || (unsigned char)*c > 0x7e)
			return bad_line(o, line, "the name of the header is not plain ASCII", err);
	for (const char *c = value; *c; c++)
		if ((unsigned char)*c < 0x20 || *c == 0x7f)
			return bad_line(o, line, "the value has a control character in it", err);
	if (is_ours(text))
		return bad_line(o, line, "this header is set by nbdrs itself; leave it out", err);
	if (strcasecmp(text, "Authorization") == 0 && o->basic != NULL)
		return bad_line(o, line,
				"Authorization, and the URL has a user, too; leave one out", err);
	if (o->headers_n == OBJECT_HEADERS_MAX)
		return bad_line(o, line, "too many headers", err);
	o->headers[o->headers_n++] = (struct http_header){ text, value };
	return 0;
}

static CO_FN int take_headers(struct object *o, struct err *err)
{
	struct file_job job = { .path = o->header_file, .err = err };
	unsigned line = 0;
	int rc = 0;

	if (o->header_file != NULL) {
		rc = offload(read_headers, &job);
		o->header_text = job.text;
	}
	for (char *next = o->header_text; next != NULL && rc == 0;) {
		char *text = strsep(&next, "\n");

		rc = take_header(o, text, ++line, err);
	}
	if (o->basic != NULL)
		o->headers[o->headers_n++] = (struct http_header){ "Authorization", o->basic };
	return rc;
}

/* ---- the first request ---- */

/* `where` is a URL that the server named: its query may be a signature. */
static int explain_move(const struct object *o, const char *where, int status, struct err *err)
{
	return err_set(err, -EREMCHG, "%s has moved to %.*s%s (HTTP %d); serve it from there",
		       o->shown, (int)strcspn(where, "?"), where, strchr(where, '?') ? "?***" : "",
		       status);
}

static int explain_status(const struct object *o, const struct http_resp *r, struct err *err)
{
	int rc = http_status_error(r->status);

	switch (rc) {
	case -ENOENT: return err_set(err, rc, "%s does not exist (HTTP %d)", o->shown, r->status);
	case -EACCES:
		return err_set(err, rc, "%s: access refused (HTTP %d); %s", o->shown, r->status,
			       o->basic || o->header_file
				       ? "are user, password and headers right?"
				       : "does it need user:password@ before the host?");
	case -EREMCHG: return explain_move(o, r->location, r->status, err);
	default: return err_set(err, rc, "%s: the server answers HTTP %d", o->shown, r->status);
	}
}

static int explain(const struct object *o, int rc, const struct http_resp *r, struct err *err)
{
	switch (rc) {
	case 0: return explain_status(o, r, err);
	case -EKEYREJECTED:
		return err_set(
			err, rc,
			"%s: the server's certificate is not trusted: %s; see ca_file and insecure",
			o->shown, r->error);
	default: return err_set(err, rc, "%s: %s", o->shown, r->error[0] ? r->error : err_name(rc));
	}
}

/* Asks a few times while there is hope; http_do's result, and -EAGAIN and the like of the last status. */
static CO_FN int insist(struct object *o, const struct iov *into, struct http_resp *r)
{
	uint64_t pause = FIRST_PAUSE_NS;
	int rc = 0;

	for (unsigned i = 0; i < TRIES; i++) {
		if (i > 0) {
			co_sleep(MAX(pause, MIN(r->retry_after_ns, PAUSE_MAX_NS)));
			pause *= 2;
			http_resp_free(r);
		}
		rc = object_ask(o, 0, into, r);
		/* Who mistyped an address does not want to wait for the answer, and a 200 is one, too. */
		if (rc == -ETIMEDOUT || rc == -EHOSTUNREACH || (rc == -EPROTO && r->status == 200))
			return rc;
		if (!is_transient(rc != 0 ? rc : http_status_error(r->status)))
			return rc;
	}
	return rc;
}

static CO_FN int size_by_head(struct object *o, struct http_resp *r, struct err *err)
{
	int rc = insist(o, NULL, r);

	if (rc != 0 || r->status != 200)
		return explain(o, rc, r, err);
	if (r->content_len == UINT64_MAX)
		return err_set(err, -EINVAL, "%s: the server does not tell its size", o->shown);
	o->size = r->content_len;
	return 0;
}

static int no_ranges(const struct object *o, struct err *err)
{
	return err_set(err, -EOPNOTSUPP,
		       "%s: the server does not serve ranges of it, so it cannot be a disk; "
		       "download it, or have the server support Range",
		       o->shown);
}

static int look_at(struct object *o, int rc, const struct http_resp *r, struct err *err)
{
	if (r->status == 200) /* an object of one byte, or more than was asked for */
		return no_ranges(o, err);
	if (rc == 0 && r->status == 416 && r->range_total == 0) {
		o->size = 0;
	} else if (rc != 0 || r->status != 206) {
		return explain(o, rc, r, err);
	} else if (!r->has_range || r->range_from != 0 || r->range_to != 1 || r->body_len != 1) {
		return no_ranges(o, err);
	} else if (r->is_encoded) {
		return err_set(err, -EOPNOTSUPP,
			       "%s: the server compresses it (Content-Encoding), so ranges of "
			       "it are not those of the disk; switch that off for it",
			       o->shown);
	} else {
		o->size = r->range_total;
	}
	(void)snprintf(o->etag, sizeof(o->etag), "%s", r->etag);
	(void)snprintf(o->last_modified, sizeof(o->last_modified), "%s", r->last_modified);
	return 0;
}

static CO_FN int pin(struct object *o, struct err *err)
{
	char byte;
	struct iovec v;
	struct iov one = iov_one(&v, &byte, 1);
	struct http_resp r;
	int rc = insist(o, &one, &r);

	rc = look_at(o, rc, &r, err);
	if (rc == 0 && o->size == UINT64_MAX) {
		http_resp_free(&r);
		rc = size_by_head(o, &r, err);
	}
	http_resp_free(&r);
	return rc;
}

int object_open(struct layer *l, struct err *err)
{
	struct object *o = l->self;
	struct http_conf conf = { .conns = (unsigned)o->conns,
				  .timeout_ns = o->timeout_ns,
				  .connect_ns = o->connect_ns,
				  .ca_file = o->ca_file,
				  .is_insecure = o->is_insecure,
				  .resolve = o->resolve };
	int rc = object_parse_url(l->ops->name, l->spec->target, l->export_name, &o->url, &o->basic,
				  err);

	if (rc == 0) {
		size_t len = strcspn(o->url, "?");

		if (asprintf(&o->shown, "%.*s%s", (int)len, o->url, o->url[len] ? "?***" : "") <
		    0) {
			o->shown = NULL;
			rc = err_set(err, -ENOMEM, "out of memory");
		}
	}
	if (rc == 0)
		rc = take_headers(o, err);
	if (rc == 0)
		rc = http_new(&conf, &o->http, err);
	if (rc == 0) {
		rc = pin(o, err);
		http_close_here(o->http); /* this reactor need not get a channel */
	}
	if (rc != 0)
		object_free(o);
	return rc;
}
