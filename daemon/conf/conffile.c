/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "conf/conffile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

/*
 * A word is never longer than it stands in the text, so words are written over the text itself. There are at most half
 * as many words as bytes, and a NULL behind each line's.
 */
struct parser {
	struct conf_file *file;
	char *at;	/* next byte to be looked at */
	unsigned line;
	size_t words_n; /* in file->words, NULLs included */
	struct err *err;
};

static int wrong(const struct parser *p, const char *what)
{
	return err_set(p->err, -EINVAL, "%s:%u: %s", p->file->path, p->line, what);
}

static bool is_blank(char c)
{
	return c == ' ' || c == '\t' || c == '\r';
}

static bool ends_word(char c)
{
	return is_blank(c) || c == '\n' || c == '\0';
}

static int take_quoted(struct parser *p, char **out)
{
	const char quote = *p->at++;
	char *to = p->at;

	*out = to;
	for (; *p->at != quote; p->at++) {
		if (*p->at == '\n' || *p->at == '\0')
			return wrong(p, "a quote is opened and not closed");
		if (quote == '"' && *p->at == '\\' && (p->at[1] == '"' || p->at[1] == '\\'))
			p->at++;
		*to++ = *p->at;
	}
	p->at++;
	if (!ends_word(*p->at))
		return wrong(p, "a blank must follow the quote that ends a word");
	*to = '\0';
	return 0;
}

/* A word that a newline ends gets its zero byte when the line is done. */
static char *take_plain(struct parser *p)
{
	char *word = p->at;

	while (!ends_word(*p->at))
		p->at++;
	if (is_blank(*p->at))
		*p->at++ = '\0';
	return word;
}

/* Takes the words of one line; leaves p->at behind its newline, or at the end. */
static int take_line(struct parser *p)
{
	struct conf_line *l = &p->file->lines[p->file->lines_n];

	*l = (struct conf_line){ .number = p->line, .words = &p->file->words[p->words_n] };
	for (;;) {
		char *word = NULL;
		int rc = 0;

		while (is_blank(*p->at))
			p->at++;
		if (*p->at == '#')
			p->at += strcspn(p->at, "\n");
		if (*p->at == '\n' || *p->at == '\0')
			break;
		if (l->words_n == CONF_WORDS_MAX)
			return wrong(p, "too many words");
		if (*p->at == '"' || *p->at == '\'')
			rc = take_quoted(p, &word);
		else
			word = take_plain(p);
		if (rc)
			return rc;
		l->words[l->words_n++] = word;
	}
	if (*p->at == '\n')
		*p->at++ = '\0';
	if (l->words_n) {
		l->words[l->words_n] = NULL;
		p->words_n += l->words_n + 1;
		p->file->lines_n++;
	}
	return 0;
}

/* Bytes that no word may hold: they would confuse terminals and logs, or be mistaken for the end. */
static int check_bytes(struct parser *p, const char *text, size_t len)
{
	p->line = 1;
	for (size_t i = 0; i < len; i++) {
		const unsigned char c = (unsigned char)text[i];

		if ((c < ' ' && c != '\n' && c != '\t' && c != '\r') || c == 0x7f)
			return wrong(p, "there is a control character in it: this is no text file");
		p->line += c == '\n';
	}
	return 0;
}

static int allocate(struct conf_file *f, const char *path, const char *text, size_t len)
{
	size_t lines = 1;

	for (size_t i = 0; i < len; i++)
		lines += text[i] == '\n';
	f->path = strdup(path);
	f->text = malloc(len + 1);
	f->words = calloc(len + 2, sizeof(*f->words));
	f->lines = calloc(lines, sizeof(*f->lines));
	if (!f->path || !f->text || !f->words || !f->lines)
		return -ENOMEM;
	memcpy(f->text, text, len);
	f->text[len] = '\0';
	return 0;
}

int conf_parse(const char *path, const char *text, size_t len, struct conf_file *out,
	       struct err *err)
{
	_cleanup_conf_ struct conf_file f = { 0 };
	struct parser p = { .file = &f, .err = err };
	int rc;

	if (allocate(&f, path, text, len))
		return err_set(err, -ENOMEM, "out of memory");
	rc = check_bytes(&p, text, len);
	p.at = f.text;
	for (p.line = 1; !rc && *p.at; p.line++)
		rc = take_line(&p);
	if (rc)
		return rc;
	*out = f;
	f = (struct conf_file){ 0 };
	return 0;
}

static int read_all(int fd, char *buf, size_t room, size_t *len)
{
	size_t n = 0;

	while (n < room) {
		ssize_t got = read(fd, buf + n, room - n);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (got == 0)
			break;
		n += (size_t)got;
	}
	*len = n;
	return 0;
}

int conf_read(const char *path, struct conf_file *out, struct err *err)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	_cleanup_free_ char *buf = malloc(CONF_BYTES_MAX + 1);
	size_t len = 0;
	int rc;

	if (fd < 0)
		return err_set(err, -errno, "cannot open %s: %s", path, strerror(errno));
	if (!buf)
		return err_set(err, -ENOMEM, "out of memory");
	rc = read_all(fd, buf, CONF_BYTES_MAX + 1, &len);
	if (rc)
		return err_set(err, rc, "cannot read %s: %s", path, strerror(-rc));
	if (len > CONF_BYTES_MAX)
		return err_set(err, -EFBIG, "%s is longer than 1 MiB: this is no configuration", path);
	return conf_parse(path, buf, len, out, err);
}

void conf_free(struct conf_file *f)
{
	free(f->path);
	free(f->text);
	free(f->words);
	free(f->lines);
	*f = (struct conf_file){ 0 };
}
