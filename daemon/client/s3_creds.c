/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Where keys, region and endpoint come from. The first source that has keys wins:
 *
 *	the URL's userinfo		KEY:SECRET@
 *	a file of keys			@FILE@ in the URL, or key_file=
 *	profile=			that profile of the shared files
 *	the environment			AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
 *	the shared files		profile AWS_PROFILE, else "default", of
 *					AWS_SHARED_CREDENTIALS_FILE (~/.aws/credentials), then of
 *					AWS_CONFIG_FILE (~/.aws/config)
 *
 * A file that somebody named must be there and make sense; the ones at their usual places may be
 * missing. Files are read again when a server says that a session's keys have expired (s3_renew in
 * s3_setup.c).
 *
 * A file of keys has the key on its first line, the secret on the second and may have a session
 * token on the third; or KEY:SECRET on one line, if there is only one ":" in it; or is laid out
 * like the shared credentials file. Blank lines and those that start with "#" do not count.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

enum { FILE_SIZE_MAX = 1 << 20, WORDS_MAX = 3 };

static void free_secret(char *s)
{
	if (s)
		explicit_bzero(s, strlen(s));
	free(s);
}

static void cleanup_secretp(char **s)
{
	free_secret(*s);
}

static const char *env(const char *name)
{
	const char *value = getenv(name);

	return value && *value ? value : NULL;
}

static const char *first(const char *a, const char *b)
{
	return a ? a : b;
}

static int no_memory(struct err *err)
{
	return err_set(err, -ENOMEM, "out of memory");
}

static void __attribute__((format(printf, 2, 3)))
set_source(struct s3_creds *c, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(c->source, sizeof(c->source), fmt, ap);
	va_end(ap);
}

/* ---- files ---- */

/* The whole file, NUL-terminated. -errno, -EFBIG, -EINVAL for one with a NUL in it. */
static int read_file(const char *path, char **out)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	_cleanup_(cleanup_secretp) char *text = NULL;
	struct stat st;
	size_t len = 0;

	if (fd < 0)
		return -errno;
	if (fstat(fd, &st) != 0)
		return -errno;
	if (S_ISDIR(st.st_mode))
		return -EISDIR;
	text = calloc(1, FILE_SIZE_MAX + 1); /* a pipe has no size to ask for */
	if (!text)
		return -ENOMEM;
	while (len < FILE_SIZE_MAX) {
		ssize_t n = read(fd, text + len, FILE_SIZE_MAX - len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		len += (size_t)n;
	}
	if (len == FILE_SIZE_MAX)
		return -EFBIG;
	if (strlen(text) != len)
		return -EINVAL;
	*out = TAKE_PTR(text);
	return 0;
}

static int read_named(const char *path, const char *what, char **out, struct err *err)
{
	int rc = read_file(path, out);

	return rc ? err_set(err, rc, "s3: %s %s can't be read (%s)", what, path, err_name(rc)) : 0;
}

/* Cuts blanks off both ends, in place. */
static char *strip(char *s)
{
	size_t len;

	s += strspn(s, " \t\r");
	len = strlen(s);
	while (len > 0 && strchr(" \t\r", s[len - 1]))
		s[--len] = '\0';
	return s;
}

/*
 * The next line that counts, stripped; NULL at the end. `is_indented` (may be NULL): it began with
 * a blank.
 */
static char *next_line(char **text, bool *is_indented)
{
	for (char *line = strsep(text, "\n"); line; line = strsep(text, "\n")) {
		char *s = strip(line);

		if (!*s || *s == '#' || *s == ';')
			continue;
		if (is_indented)
			*is_indented = *line == ' ' || *line == '\t';
		return s;
	}
	return NULL;
}

/* ---- profiles ---- */

/* What a profile says; points into the file's text. */
struct profile {
	const char *key, *secret, *token, *region, *endpoint;
	bool is_there;
};

/*
 * Is "[text]" the section of profile `name`? In the config file it is called "profile NAME", but
 * "default".
 */
static bool is_section(char *text, const char *name, bool is_config)
{
	static const char word[] = "profile";
	char *end = strchr(text, ']');

	if (!end)
		return false;
	*end = '\0';
	text = strip(text);
	if (is_config && strncmp(text, word, strlen(word)) == 0 &&
	    strchr(" \t", text[strlen(word)]))
		text = strip(text + strlen(word));
	else if (is_config && strcmp(name, "default") != 0)
		return false;
	return strcmp(text, name) == 0;
}

static void set_value(struct profile *p, const char *key, const char *value)
{
	const struct {
		const char *name;
		const char **field;
	} fields[] = {
		{ "aws_access_key_id", &p->key },   { "aws_secret_access_key", &p->secret },
		{ "aws_session_token", &p->token }, { "region", &p->region },
		{ "endpoint_url", &p->endpoint },
	};

	for (unsigned i = 0; i < ARRAY_LEN(fields); i++) {
		if (strcasecmp(fields[i].name, key) == 0 && *value)
			*fields[i].field = value;
	}
}

/* Changes `text`; *p points into it. */
static void find_profile(char *text, const char *name, bool is_config, struct profile *p)
{
	bool is_ours = false, is_indented;
	char *line;

	*p = (struct profile){ 0 };
	while ((line = next_line(&text, &is_indented))) {
		char *value;

		if (*line == '[') {
			is_ours = is_section(line + 1, name, is_config);
			p->is_there |= is_ours;
			continue;
		}
		value = strchr(line, '=');
		if (!is_ours || is_indented ||
		    !value) /* indented: belongs to a nested section such as "s3 =" */
			continue;
		*value++ = '\0';
		set_value(p, strip(line), strip(value));
	}
}

/* ---- sources ---- */

/* They go into header lines. */
static bool is_clean(const char *text)
{
	for (; text && *text; text++) {
		if ((unsigned char)*text < 0x20 || *text == 0x7f)
			return false;
	}
	return true;
}

static int take_keys(struct s3_creds *c, const char *key, const char *secret, const char *token,
		     struct err *err)
{
	if (!is_clean(key) || !is_clean(token))
		return err_set(err, -EINVAL,
			       "s3: the key or token from %s has control characters in it",
			       c->source);
	c->key = strdup(key);
	c->secret = strdup(secret);
	c->token = token ? strdup(token) : NULL;
	if (!c->key || !c->secret || (token && !c->token))
		return no_memory(err);
	return 0;
}

/* A profile's keys, if it has any. */
static int take_profile(struct s3_creds *c, const struct profile *p, const char *name,
			const char *path, struct err *err)
{
	if (!p->key && !p->secret)
		return 0;
	if (!p->key || !p->secret)
		return err_set(err, -EINVAL, "s3: profile %s of %s lacks %s", name, path,
			       p->key ? "aws_secret_access_key" : "aws_access_key_id");
	set_source(c, "profile %s of %s", name, path);
	return take_keys(c, p->key, p->secret, p->token, err);
}

/* Is the first line that counts the head of a section? */
static bool has_sections(const char *text)
{
	text += strspn(text, " \t\r\n");
	while (*text == '#' || *text == ';') {
		text += strcspn(text, "\n");
		text += strspn(text, " \t\r\n");
	}
	return *text == '[';
}

static int from_key_file(struct s3_config *c, const char *path, struct err *err)
{
	_cleanup_(cleanup_secretp) char *text = NULL;
	const char *name = first(c->profile, "default");
	char *words[WORDS_MAX + 1] = { 0 }, *at, *colon;
	struct profile p;
	unsigned n = 0;
	int rc = read_named(path, "the file of keys", &text, err);

	if (rc || !text)
		return rc;
	if (has_sections(text)) {
		find_profile(text, name, false, &p);
		if (!p.is_there)
			return err_set(err, -EINVAL, "s3: %s has no profile [%s]", path, name);
		rc = take_profile(&c->creds, &p, name, path, err);
		return !rc && !c->creds.key
			       ? err_set(err, -EINVAL, "s3: profile [%s] of %s has no keys", name,
					 path)
			       : rc;
	}
	at = text;
	while (n <= WORDS_MAX && (words[n] = next_line(&at, NULL)))
		n++;
	colon = n == 1 ? strchr(words[0], ':') : NULL;
	if (colon && !strchr(colon + 1, ':')) {
		*colon = '\0';
		words[1] = colon + 1;
		n = 2;
	}
	if (n < 2 || n > WORDS_MAX || !*words[0] || !*words[1])
		return err_set(
			err, -EINVAL,
			"s3: the file of keys %s must have the key on its first line, the secret on the second, and "
			"may have a session token on the third",
			path);
	set_source(&c->creds, "%s", path);
	return take_keys(&c->creds, words[0], words[1], words[2], err);
}

static int from_environment(struct s3_config *c, struct err *err)
{
	const char *key = env("AWS_ACCESS_KEY_ID"), *secret = env("AWS_SECRET_ACCESS_KEY");

	if (!key && !secret)
		return 0;
	if (!key || !secret)
		return err_set(err, -EINVAL,
			       "s3: of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only %s is set",
			       key ? "the first" : "the second");
	set_source(&c->creds, "the environment");
	return take_keys(&c->creds, key, secret, env("AWS_SESSION_TOKEN"), err);
}

/* Region and endpoint, unless known; never an error, these have defaults. */
static int take_settings(struct s3_config *c, const struct profile *p)
{
	if (!c->found_region && p->region) {
		c->found_region = strdup(p->region);
		if (!c->found_region)
			return -ENOMEM;
	}
	if (!c->found_endpoint && p->endpoint) {
		c->found_endpoint = strdup(p->endpoint);
		if (!c->found_endpoint)
			return -ENOMEM;
		c->endpoint_source = "endpoint_url of the profile";
	}
	return 0;
}

/* The shared files. */
static const struct shared {
	const char *variable, *usual;
	bool is_config;
} shared[] = {
	{ "AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials", false },
	{ "AWS_CONFIG_FILE", ".aws/config", true },
};

/* Reads one of them. When no keys are wanted of it, it may as well be missing. */
static int from_shared(struct s3_config *c, const struct shared *file, const char *name,
		       bool wants_keys, bool *found, struct err *err)
{
	_cleanup_(cleanup_secretp) char *text = NULL;
	const char *named = env(file->variable), *home = env("HOME");
	_cleanup_free_ char *path = NULL;
	struct profile p;
	int rc;

	if (!named && !home)
		return 0;
	if (asprintf(&path, "%s%s%s", named ? named : home, named ? "" : "/",
		     named ? "" : file->usual) < 0) {
		path = NULL;
		return no_memory(err);
	}
	rc = read_file(path, &text);
	if (rc == -ENOMEM)
		return no_memory(err);
	if (rc && named && wants_keys)
		return err_set(err, rc, "s3: %s, named by %s, can't be read (%s)", path,
			       file->variable, err_name(rc));
	if (rc)
		return 0;
	find_profile(text, name, file->is_config, &p);
	*found |= p.is_there;
	if (take_settings(c, &p) != 0)
		return no_memory(err);
	return wants_keys && !c->creds.key ? take_profile(&c->creds, &p, name, path, err) : 0;
}

/* Both: for keys, if there are none yet, for the region and for the endpoint. */
static int from_shared_files(struct s3_config *c, struct err *err)
{
	const char *wanted = first(c->profile, env("AWS_PROFILE")),
		   *name = first(wanted, "default");
	bool wants_keys = !c->creds.key, found = false;

	for (unsigned i = 0; i < ARRAY_LEN(shared); i++) {
		int rc = from_shared(c, &shared[i], name, wants_keys, &found, err);

		if (rc)
			return rc;
	}
	if (!wants_keys || !wanted)
		return 0;
	if (!found)
		return err_set(err, -ENOENT,
			       "s3: there is no profile \"%s\" (%s) in the shared credentials file",
			       name, c->profile ? "option profile" : "AWS_PROFILE");
	if (!c->creds.key)
		return err_set(
			err, -EINVAL,
			"s3: profile \"%s\" has no aws_access_key_id; keys that a program or a login hands out "
			"must be put into the environment",
			name);
	return 0;
}

static int load(struct s3_config *c, const struct s3_url *u, struct err *err)
{
	const char *key_file = first(u->key_file, c->key_file);
	int rc = 0;

	if (u->key && c->key_file)
		return err_set(err, -EINVAL,
			       "s3: keys are both in the URL and by key_file=; give one of them");
	if (u->key_file && c->key_file)
		return err_set(err, -EINVAL,
			       "s3: two files of keys are named, in the URL and by key_file=");
	if (u->key) {
		set_source(&c->creds, "the URL");
		rc = take_keys(&c->creds, u->key, u->secret, NULL, err);
	} else if (key_file) {
		rc = from_key_file(c, key_file, err);
	} else if (!c->profile) {
		rc = from_environment(c, err);
	}
	if (!rc && !c->found_region && env("AWS_REGION"))
		c->found_region = strdup(env("AWS_REGION"));
	else if (!rc && !c->found_region && env("AWS_DEFAULT_REGION"))
		c->found_region = strdup(env("AWS_DEFAULT_REGION"));
	if (!rc && !u->host) {
		const char *s3 = env("AWS_ENDPOINT_URL_S3"), *any = env("AWS_ENDPOINT_URL");

		c->found_endpoint = s3 || any ? strdup(first(s3, any)) : NULL;
		c->endpoint_source = s3 ? "AWS_ENDPOINT_URL_S3" : "AWS_ENDPOINT_URL";
	}
	if (!rc)
		rc = from_shared_files(c, err);
	if (!rc && c->token && c->creds.key) {
		free_secret(c->creds.token);
		c->creds.token = strdup(c->token);
		if (!c->creds.token)
			rc = no_memory(err);
	}
	return rc;
}

int s3_config_load(struct s3_config *c, const struct s3_url *u, struct err *err)
{
	int rc;

	c->creds = (struct s3_creds){ .source = "nowhere" };
	c->found_region = NULL;
	c->found_endpoint = NULL;
	c->endpoint_source = NULL;
	rc = load(c, u, err);
	if (rc)
		s3_config_free(c);
	return rc;
}

void s3_creds_free(struct s3_creds *c)
{
	free_secret(c->key);
	free_secret(c->secret);
	free_secret(c->token);
	*c = (struct s3_creds){ 0 };
}

void s3_config_free(struct s3_config *c)
{
	s3_creds_free(&c->creds);
	free(c->found_region);
	free(c->found_endpoint);
	c->found_region = NULL;
	c->found_endpoint = NULL;
}
