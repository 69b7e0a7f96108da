/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Masking of secrets in chains.
 *
 * A URL's userinfo is taken to reach up to the last "@" of the URL, because keys are pasted with "/" and
 * "@" in them. Text that does not parse is scanned by the same rules without knowing where its parts
 * end; there a URL reaches up to the next blank or the next "://".
 */
#include "conf/secret.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "nbdrs/cleanup.h"

static bool contains(const char *text, size_t len, const char *word)
{
	size_t word_len = strlen(word);

	for (size_t i = 0; i + word_len <= len; i++) {
		if (strncasecmp(text + i, word, word_len) == 0)
			return true;
	}
	return false;
}

bool secret_is_key(const char *key, size_t len)
{
	static const char *const words[] = { "secret", "passw", "token", "credential" };

	if (len >= 3 && strncasecmp(key + len - 3, "key", 3) == 0)
		return true;
	for (unsigned i = 0; i < ARRAY_LEN(words); i++) {
		if (contains(key, len, words[i]))
			return true;
	}
	return false;
}

/* The text being made, and the place in the source that is followed. */
struct masker {
	const char *text;
	char *out;
	size_t len;         /* of out */
	size_t done;        /* of text */
	size_t want, found; /* offset into text; the same place in out */
};

static void copy_to(struct masker *m, size_t end)
{
	if (m->want >= m->done && m->want < end)
		m->found = m->len + (m->want - m->done);
	memcpy(m->out + m->len, m->text + m->done, end - m->done);
	m->len += end - m->done;
	m->done = end;
}

/* Puts the mask in the place of everything up to `end`. */
static void mask_to(struct masker *m, size_t end)
{
	if (end == m->done)
		return;
	if (m->want >= m->done && m->want < end)
		m->found = m->len;
	memcpy(m->out + m->len, SECRET_MASK, strlen(SECRET_MASK));
	m->len += strlen(SECRET_MASK);
	m->done = end;
}

static bool masker_start(struct masker *m, const char *text, size_t want)
{
	/* A mask stands for at least one byte, so each byte becomes at most a whole mask. */
	*m = (struct masker){ .text = text, .want = want };
	m->out = malloc(strlen(text) * strlen(SECRET_MASK) + 1);
	return m->out;
}

static char *masker_end(struct masker *m)
{
	size_t len = m->done + strlen(m->text + m->done);

	copy_to(m, len);
	if (m->want >= len)
		m->found = m->len;
	m->out[m->len] = '\0';
	return m->out;
}

/* Masks userinfo and query of a URL: [m->done, end) is what follows its "//". */
static void mask_url(struct masker *m, size_t end)
{
	const char *at = memrchr(m->text + m->done, '@', end - m->done);
	const char *query;

	if (at)
		mask_to(m, (size_t)(at - m->text));
	query = memchr(m->text + m->done, '?', end - m->done);
	if (!query)
		return;
	copy_to(m, (size_t)(query + 1 - m->text));
	mask_to(m, end);
}

char *secret_mask_target(const char *layer, const char *target)
{
	struct masker m;
	const char *url = strstr(target, "//");

	if (!masker_start(&m, target, 0))
		return NULL;
	if (strcmp(layer, "file") != 0) { /* a path has no secrets, but may have an "@" */
		copy_to(&m, url ? (size_t)(url + 2 - target) : 0);
		mask_url(&m, strlen(target));
	}
	return masker_end(&m);
}

static bool is_name_char(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
	       c == '_' || c == '-' || c == '.';
}

/* Length of what starts a URL at text[i]: "://", or a store that takes keys without a scheme. */
static size_t url_start_len(const char *text, size_t i)
{
	if (strncmp(text + i, "://", 3) == 0)
		return 3;
	if (strncmp(text + i, "s3:", 3) == 0 && (i == 0 || !is_name_char(text[i - 1])))
		return 3;
	return 0;
}

/* Where the URL that follows text[i] ends at the latest. */
static size_t url_end(const char *text, size_t i)
{
	while (text[i] && !strchr(" \t\n", text[i]) && strncmp(text + i, "://", 3) != 0)
		i++;
	return i;
}

/* Masks the value behind the "=" at text[i]; is_listed: in the form with ";" instead of brackets. */
static void mask_value(struct masker *m, size_t i, bool is_listed)
{
	size_t end = i + 1;

	copy_to(m, end);
	if (m->text[end] == '"') {
		for (end++; m->text[end] && m->text[end] != '"'; end++)
			end += m->text[end] == '\\' && m->text[end + 1];
	} else {
		end += strcspn(m->text + end, is_listed ? ";" : ",]");
	}
	mask_to(m, end);
}

char *secret_mask_text(const char *text, size_t *at)
{
	struct masker m;
	size_t name = 0; /* where the name before text[i] begins */
	bool in_brackets = false;

	if (!masker_start(&m, text, *at))
		return NULL;
	for (size_t i = 0; text[i]; i = MAX(i + 1, m.done)) {
		size_t start_len = url_start_len(text, i);

		if (start_len) {
			copy_to(&m, i + start_len);
			mask_url(&m, url_end(text, m.done));
			name = m.done;
		} else if (text[i] == '=' && secret_is_key(text + name, i - name)) {
			mask_value(&m, i, !in_brackets);
		}
		if (text[i] == '[' || text[i] == ']')
			in_brackets = text[i] == '[';
		if (!is_name_char(text[i]))
			name = i + 1;
	}
	*at = (masker_end(&m), m.found);
	return m.out;
}
