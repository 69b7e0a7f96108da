/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "s3_fake.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/s3.h"

enum { KEY_LEN = 2048, SKEW_S = 900, TEXT_MAX = 1 << 20 };

#define HAS "\r\n"

/* One request, as it came; everything ends with a NUL. */
struct request {
	char head[FAKE_HEAD_MAX + 1];
	char method[16], key[KEY_LEN], query[KEY_LEN * 2];
	uint8_t *body;
	size_t body_len;
};

/* What is sent back. */
struct answer {
	int status;
	char headers[2048];
	char *text;          /* owned */
	const uint8_t *data; /* borrowed; instead of text */
	size_t len;
	bool has_no_body; /* HEAD: only the length is told */
};

/* Also where it has effects; a test that can't go on ends here. */
static void must(bool is_true)
{
	if (!is_true)
		abort();
}

/* ---- texts ---- */

/* Appends to a malloc'ed text of TEXT_MAX bytes. */
static void __attribute__((format(printf, 2, 3))) add(char *text, const char *fmt, ...)
{
	size_t at = strlen(text);
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(text + at, TEXT_MAX - at, fmt, ap);
	va_end(ap);
	must(n >= 0 && (size_t)n < TEXT_MAX - at);
}

static int hex(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10;
}

static void decode(char *text)
{
	char *out = text;

	for (const char *p = text; *p; p++) {
		if (*p == '%') {
			*out++ = (char)(hex(p[1]) << 4 | hex(p[2]));
			p += 2;
		} else {
			*out++ = *p;
		}
	}
	*out = '\0';
}

/* The value of a header into `out`; false and "" when it is not there. */
static bool header(const struct request *r, const char *name, char *out, size_t room)
{
	size_t len = strlen(name);

	out[0] = '\0';
	for (const char *line = strstr(r->head, HAS); line; line = strstr(line, HAS)) {
		line += 2;
		if (strncasecmp(line, name, len) == 0 && line[len] == ':') {
			line += len + 1;
			line += strspn(line, " ");
			(void)snprintf(out, room, "%.*s", (int)strcspn(line, "\r"), line);
			return true;
		}
	}
	return false;
}

/* A parameter of the query, decoded. */
static bool param(const struct request *r, const char *name, char *out, size_t room)
{
	size_t len = strlen(name);

	out[0] = '\0';
	for (const char *p = r->query; p; p = strchr(p, '&')) {
		p += *p == '&';
		if (strncmp(p, name, len) == 0 && (p[len] == '=' || p[len] == '&' || !p[len])) {
			p += len + (p[len] == '=');
			(void)snprintf(out, room, "%.*s", (int)strcspn(p, "&"), p);
			decode(out);
			return true;
		}
	}
	return false;
}

static bool is_sorted(const char *query)
{
	char last[KEY_LEN] = "", now[KEY_LEN];

	for (const char *p = query; p && *p; p = strchr(p, '&')) {
		p += *p == '&';
		(void)snprintf(now, sizeof(now), "%.*s", (int)strcspn(p, "=&"), p);
		if (strcmp(last, now) > 0 || !memchr(p, '=', strcspn(p, "&")))
			return false;
		memcpy(last, now, sizeof(last));
	}
	return true;
}

static void error(struct answer *a, int status, const char *code)
{
	a->status = status;
	a->data = NULL;
	a->text = calloc(1, TEXT_MAX);
	must(a->text);
	add(a->text,
	    "<?xml version=\"1.0\"?><Error><Code>%s</Code><Message>as the test wants it</Message></Error>",
	    code);
	a->len = strlen(a->text);
}

/* ---- objects; the lock is held ---- */

/* The first that is not before `key`. */
static unsigned find(const struct s3_fake *f, const char *key)
{
	unsigned i = 0;

	while (i < f->objects_n && strcmp(f->objects[i].key, key) < 0)
		i++;
	return i;
}

static struct fake_object *get(struct s3_fake *f, const char *key)
{
	unsigned i = find(f, key);

	return i < f->objects_n && strcmp(f->objects[i].key, key) == 0 ? &f->objects[i] : NULL;
}

static void removed(struct s3_fake *f, const char *key)
{
	struct fake_object *o = get(f, key);
	size_t at;

	if (!o)
		return;
	free(o->key);
	free(o->data);
	at = (size_t)(o - f->objects);
	memmove(o, o + 1, (f->objects_n - at - 1) * sizeof(*o));
	f->objects_n--;
}

static struct fake_object *put(struct s3_fake *f, const char *key, const void *data, size_t len)
{
	struct fake_object *o;
	unsigned i;

	removed(f, key);
	i = find(f, key);
	must(f->objects_n < FAKE_OBJECTS_MAX);
	memmove(&f->objects[i + 1], &f->objects[i], (f->objects_n - i) * sizeof(*o));
	f->objects_n++;
	o = &f->objects[i];
	*o = (struct fake_object){ strdup(key), malloc(len + 1), len, ++f->versions };
	must(o->key && o->data);
	memcpy(o->data, data, len);
	return o;
}

/* `out` has ETAG_MAX + 1 bytes. */
static void etag_text(const struct s3_fake *f, const struct fake_object *o, char *out)
{
	struct iovec v = { o->data, o->len };
	struct iov iov = { &v, 1, o->len };

	if (f->has_md5_etags)
		must(s3_md5_hex(&iov, out) == 0);
	else
		(void)snprintf(out, ETAG_MAX + 1, "v%u", o->version);
}

static void tell_etag(const struct s3_fake *f, const struct fake_object *o, struct answer *a,
		      const char *mark)
{
	char etag[ETAG_MAX + 1];
	size_t at = strlen(a->headers);

	if (f->has_no_etags)
		return;
	etag_text(f, o, etag);
	(void)snprintf(a->headers + at, sizeof(a->headers) - at, "ETag: \"%s%s\"" HAS, etag, mark);
}

void s3_fake_put(struct s3_fake *f, const char *key, const void *data, size_t len)
{
	(void)pthread_mutex_lock(&f->lock);
	(void)put(f, key, data, len);
	(void)pthread_mutex_unlock(&f->lock);
}

bool s3_fake_is(struct s3_fake *f, const char *key, const char *text)
{
	const struct fake_object *o;
	bool is;

	(void)pthread_mutex_lock(&f->lock);
	o = get(f, key);
	is = o && o->len == strlen(text) && memcmp(o->data, text, o->len) == 0;
	(void)pthread_mutex_unlock(&f->lock);
	return is;
}

bool s3_fake_has(struct s3_fake *f, const char *key)
{
	bool has;

	(void)pthread_mutex_lock(&f->lock);
	has = get(f, key);
	(void)pthread_mutex_unlock(&f->lock);
	return has;
}

unsigned s3_fake_count(struct s3_fake *f)
{
	unsigned n;

	(void)pthread_mutex_lock(&f->lock);
	n = f->objects_n;
	(void)pthread_mutex_unlock(&f->lock);
	return n;
}

void s3_fake_force(struct s3_fake *f, unsigned n, const char *method, int status,
		   const char *headers, const char *body)
{
	(void)pthread_mutex_lock(&f->lock);
	f->forced_method = method;
	f->forced_status = status;
	f->forced_headers = headers;
	(void)snprintf(f->forced_body, sizeof(f->forced_body), "%s", body ? body : "");
	f->forced_last = NULL;
	atomic_store(&f->forced_n, n);
	(void)pthread_mutex_unlock(&f->lock);
}

void s3_fake_force_last(struct s3_fake *f, const char *code)
{
	(void)pthread_mutex_lock(&f->lock);
	f->forced_last = code;
	(void)pthread_mutex_unlock(&f->lock);
}

/* ---- what it can do; the lock is held ---- */

static bool is_met(const struct s3_fake *f, const struct request *r, const struct fake_object *o)
{
	char want[256], have[ETAG_MAX + 1];

	if (header(r, "if-none-match", want, sizeof(want)))
		return !o;
	if (!header(r, "if-match", want, sizeof(want)))
		return true;
	if (!o)
		return false;
	etag_text(f, o, have);
	return strcmp(want, have) == 0; /* without quotes only, as Ceph */
}

static void do_put(struct s3_fake *f, const struct request *r, struct answer *a)
{
	bool met = is_met(f, r, get(f, r->key));
	char value[256];
	bool is_absent = header(r, "if-none-match", value, sizeof(value));
	bool is_cond = is_absent || header(r, "if-match", value, sizeof(value));

	if (is_cond && f->cond == COND_UNKNOWN) {
		error(a, 501, "NotImplemented");
		return;
	}
	if (!met && f->cond != COND_IGNORED && (is_absent || f->cond != COND_ONLY_ABSENT)) {
		error(a, f->cond == COND_CONFLICT ? 409 : 412,
		      f->cond == COND_CONFLICT ? "ConditionalRequestConflict"
					       : "PreconditionFailed");
		return;
	}
	a->status = 200;
	tell_etag(f, put(f, r->key, r->body, r->body_len), a, "");
}

static void do_range(const struct s3_fake *f, const struct fake_object *o, const char *range,
		     struct answer *a)
{
	uint64_t from, to;
	size_t at = strlen(a->headers);

	must(sscanf(range, "bytes=%" SCNu64 "-%" SCNu64, &from, &to) == 2);
	if (from >= o->len) {
		error(a, 416, "InvalidRange");
		return;
	}
	to = MIN(to + 1, o->len);
	if (f->ranges == RANGES_SHORT)
		to -= (to - from) / 2;
	if (f->ranges == RANGES_SHIFTED && from > 0)
		from--, to--;
	a->status = 206;
	a->data = o->data + from;
	a->len = to - from;
	(void)snprintf(a->headers + at, sizeof(a->headers) - at,
		       "Content-Range: bytes %" PRIu64 "-%" PRIu64 "/%zu" HAS, from, to - 1,
		       o->len);
}

static void do_get(struct s3_fake *f, const struct request *r, struct answer *a)
{
	const struct fake_object *o = get(f, r->key);
	char range[128];

	if (!o) {
		error(a, 404, "NoSuchKey");
	} else if (!is_met(f, r, o)) {
		error(a, 412, "PreconditionFailed");
	} else {
		tell_etag(f, o, a, f->renames_etags ? "-gz" : "");
		a->status = 200;
		a->data = o->data;
		a->len = o->len;
		if (header(r, "range", range, sizeof(range)) && f->ranges != RANGES_IGNORED)
			do_range(f, o, range, a);
	}
}

static void do_list(struct s3_fake *f, const struct request *r, struct answer *a)
{
	char prefix[KEY_LEN], token[KEY_LEN], encoded[3 * KEY_LEN + 1], max[16];
	char etag[ETAG_MAX + 1];
	unsigned n = 0, i, page = f->page;

	atomic_fetch_add(&f->lists, 1);
	(void)param(r, "prefix", prefix, sizeof(prefix));
	must(param(r, "list-type", token, sizeof(token)) && strcmp(token, "2") == 0);
	must(param(r, "delimiter", token, sizeof(token)) && strcmp(token, "/") == 0);
	must(param(r, "max-keys", max, sizeof(max)));
	page = MIN(page, (unsigned)strtoul(max, NULL, 10));
	/* The token is the first key of the next page, with something to be encoded in it. */
	i = param(r, "continuation-token", token, sizeof(token)) ? find(f, token + 2)
								 : find(f, prefix);
	a->text = calloc(1, TEXT_MAX);
	must(a->text);
	add(a->text, "<ListBucketResult><Name>b</Name>");
	for (; i < f->objects_n && n < page &&
	       strncmp(f->objects[i].key, prefix, strlen(prefix)) == 0;
	     i++) {
		const struct fake_object *o = &f->objects[i];

		if (strchr(o->key + strlen(prefix), '/'))
			continue; /* a CommonPrefix */
		(void)s3_encode(o->key, strlen(o->key), false, encoded);
		etag_text(f, o, etag);
		add(a->text,
		    "<Contents><Key>%s</Key><ETag>&quot;%s&quot;</ETag><Size>%zu</Size></Contents>",
		    encoded, f->has_no_etags ? "" : etag, o->len);
		n++;
	}
	if (i < f->objects_n && n == page)
		add(a->text,
		    "<IsTruncated>true</IsTruncated><NextContinuationToken>+=%s</NextContinuationToken>",
		    f->repeats_token ? "" : f->objects[i].key);
	add(a->text, "<EncodingType>url</EncodingType></ListBucketResult>");
	a->status = 200;
	a->len = strlen(a->text);
}

static void do_multi_delete(struct s3_fake *f, const struct request *r, struct answer *a)
{
	char md5[64], want[64], *p = (char *)r->body;

	if (f->has_no_multi_delete) {
		error(a, 501, "NotImplemented");
		return;
	}
	atomic_fetch_add(&f->multi_deletes, 1);
	must(s3_md5(r->body, r->body_len, want) == 0);
	if (!header(r, "content-md5", md5, sizeof(md5)) || strcmp(md5, want) != 0) {
		error(a, 400, "InvalidDigest");
		return;
	}
	a->text = calloc(1, TEXT_MAX);
	must(a->text);
	add(a->text, "<DeleteResult>");
	while ((p = strstr(p, "<Key>"))) {
		char *end = strstr(p, "</Key>");

		p += 5;
		*end = '\0';
		if (f->undeletable && strcmp(f->undeletable, p) == 0)
			add(a->text,
			    "<Error><Key>%s</Key><Code>AccessDenied</Code><Message>no</Message></Error>",
			    p);
		else
			removed(f, p);
		p = end + 1;
	}
	add(a->text, "</DeleteResult>");
	a->status = 200;
	a->len = strlen(a->text);
}

static time_t date_of(const char *text)
{
	struct tm tm = { 0 };
	int n = sscanf(text, "%4d%2d%2dT%2d%2d%2dZ", &tm.tm_year, &tm.tm_mon, &tm.tm_mday,
		       &tm.tm_hour, &tm.tm_min, &tm.tm_sec);

	tm.tm_year -= 1900;
	tm.tm_mon--;
	return n == 6 ? timegm(&tm) : 0;
}

/* Looks at the headers that every signed request has; 0 or the error. */
static bool is_refused(struct s3_fake *f, const struct request *r, struct answer *a)
{
	char value[1024], hash[S3_HASH_LEN + 1];
	struct iovec v = { r->body, r->body_len };
	struct iov iov = { &v, 1, r->body_len };
	int64_t off;

	if (!header(r, "authorization", value, sizeof(value))) {
		atomic_fetch_add(&f->unsigned_requests, 1);
		if (!f->is_public)
			error(a, 403, "AccessDenied");
		return !f->is_public;
	}
	if (!strstr(value, "Credential=" FAKE_KEY "/")) {
		error(a, 403, "InvalidAccessKeyId");
		return true;
	}
	(void)header(r, "x-amz-security-token", value, sizeof(value));
	if (strcmp(value, f->token ? f->token : "") != 0) {
		error(a, 400, "ExpiredToken");
		return true;
	}
	must(header(r, "x-amz-date", value, sizeof(value)));
	off = (int64_t)date_of(value) - ((int64_t)time(NULL) + f->clock_off_s);
	if (off > SKEW_S || off < -SKEW_S) {
		atomic_fetch_add(&f->skewed, 1);
		error(a, 403, "RequestTimeTooSkewed");
		return true;
	}
	must(s3_hash(&iov, hash) == 0);
	if (!header(r, "x-amz-content-sha256", value, sizeof(value)) || strcmp(value, hash) != 0)
		atomic_fetch_add(&f->bad_hashes, 1);
	return false;
}

static bool is_forced(struct s3_fake *f, const struct request *r, struct answer *a)
{
	if (atomic_load(&f->forced_n) == 0 ||
	    (f->forced_method[0] && strcmp(f->forced_method, r->method) != 0))
		return false;
	if (atomic_fetch_sub(&f->forced_n, 1) == 1 && f->forced_last) {
		error(a, 400, f->forced_last);
		return true;
	}
	a->status = f->forced_status;
	(void)snprintf(a->headers, sizeof(a->headers), "%s",
		       f->forced_headers ? f->forced_headers : "");
	a->data = (const uint8_t *)f->forced_body;
	a->len = strlen((const char *)a->data);
	return true;
}

static void answer(struct s3_fake *f, const struct request *r, struct answer *a)
{
	atomic_fetch_add(&f->requests, 1);
	if (strcmp(r->method, "PUT") == 0)
		atomic_fetch_add(&f->puts, 1);
	if (strcmp(r->method, "HEAD") == 0)
		atomic_fetch_add(&f->heads, 1);
	if (!is_sorted(r->query))
		atomic_store(&f->is_unsorted, true);
	if (is_forced(f, r, a) || is_refused(f, r, a))
		return;
	if (strcmp(r->method, "POST") == 0) {
		do_multi_delete(f, r, a);
	} else if (strcmp(r->method, "PUT") == 0) {
		do_put(f, r, a);
	} else if (strcmp(r->method, "DELETE") == 0) {
		atomic_fetch_add(&f->deletes, 1);
		removed(f, r->key);
		a->status = 204;
	} else if (r->key[0]) {
		do_get(f, r, a);
	} else {
		do_list(f, r, a);
	}
}

/* ---- requests that are late ---- */

void s3_fake_hold(struct s3_fake *f, unsigned n, const char *method)
{
	(void)pthread_mutex_lock(&f->lock);
	f->hold_n = n;
	f->held_method = method;
	(void)pthread_mutex_unlock(&f->lock);
}

void s3_fake_wait_held(struct s3_fake *f, unsigned n)
{
	(void)pthread_mutex_lock(&f->lock);
	while (f->held < n)
		(void)pthread_cond_wait(&f->changed, &f->lock);
	(void)pthread_mutex_unlock(&f->lock);
}

void s3_fake_release(struct s3_fake *f)
{
	(void)pthread_mutex_lock(&f->lock);
	f->hold_n = 0;
	f->releases++;
	(void)pthread_cond_broadcast(&f->changed);
	while (f->held > 0)
		(void)pthread_cond_wait(&f->changed, &f->lock);
	(void)pthread_mutex_unlock(&f->lock);
}

/* True when it was kept; the caller says so when it has been done. The lock is held. */
static bool wait_if_late(struct s3_fake *f, const struct request *r)
{
	const unsigned round = f->releases;

	if (f->hold_n == 0 || strcmp(f->held_method, r->method) != 0)
		return false;
	f->hold_n--;
	f->held++;
	(void)pthread_cond_broadcast(&f->changed);
	while (f->releases == round && !f->is_stopping)
		(void)pthread_cond_wait(&f->changed, &f->lock);
	return true;
}

/* ---- HTTP ---- */

static bool send_all(int fd, const void *data, size_t len)
{
	while (len > 0) {
		ssize_t n = send(fd, data, len, MSG_NOSIGNAL);

		if (n <= 0)
			return false;
		data = (const uint8_t *)data + n;
		len -= (size_t)n;
	}
	return true;
}

static bool send_answer(struct s3_fake *f, int fd, const struct answer *a)
{
	time_t now = time(NULL) + (time_t)f->clock_off_s;
	char head[4096], date[64];
	struct tm tm;
	int n;

	(void)strftime(date, sizeof(date), "%a, %d %b %Y %H:%M:%S GMT", gmtime_r(&now, &tm));
	n = snprintf(head, sizeof(head), "HTTP/1.1 %d X" HAS "Date: %s" HAS "%s", a->status, date,
		     a->headers);
	if (a->status != 204)
		n += snprintf(head + n, sizeof(head) - (size_t)n, "Content-Length: %zu" HAS,
			      a->len);
	n += snprintf(head + n, sizeof(head) - (size_t)n, HAS);
	return send_all(fd, head, (size_t)n) &&
	       (a->has_no_body || a->status == 204 ||
		send_all(fd, a->data ? a->data : (void *)a->text, a->len));
}

/* Head and body of one request; false at the end of the connection. */
static bool receive(int fd, struct request *r)
{
	size_t len = 0, done;
	char value[32], *end = NULL, *query;

	while (!end) {
		/*
		 * Byte by byte: nothing of the body is to be read here, and speed does not matter.
		 */
		if (len == FAKE_HEAD_MAX || recv(fd, r->head + len, 1, 0) != 1)
			return false;
		r->head[++len] = '\0';
		end = len >= 4 && strcmp(r->head + len - 4, HAS HAS) == 0 ? r->head + len : NULL;
	}
	must(sscanf(r->head, "%15s /b/%4095s", r->method, r->query) >= 1);
	if (strncmp(r->query, "HTTP/", 5) == 0)
		r->query[0] = '\0'; /* "/b/" and nothing behind it */
	query = strchr(r->query, '?');
	must((query ? (size_t)(query - r->query) : strlen(r->query)) < sizeof(r->key));
	(void)snprintf(r->key, sizeof(r->key), "%.*s", (int)strcspn(r->query, "?"), r->query);
	decode(r->key);
	memmove(r->query, query ? query + 1 : "", query ? strlen(query + 1) + 1 : 1);
	r->body_len = header(r, "content-length", value, sizeof(value)) ? strtoul(value, NULL, 10)
									: 0;
	r->body = calloc(1, r->body_len + 1);
	must(r->body);
	for (done = 0; done < r->body_len;) {
		ssize_t n = recv(fd, r->body + done, r->body_len - done, 0);

		if (n <= 0)
			return false;
		done += (size_t)n;
	}
	return true;
}

/* The lock is held. */
static bool loses(struct s3_fake *f, const struct request *r)
{
	unsigned *left = f->lose_after > 0 ? &f->lose_after : &f->lose_puts;

	if (f->lose_puts == 0 || strcmp(r->method, "PUT") != 0)
		return false;
	(*left)--;
	return left == &f->lose_puts;
}

static bool serve_one(struct s3_fake *f, int fd, struct request *r)
{
	struct answer a = { .has_no_body = false };
	bool goes_on, is_late, is_lost;

	memset(r, 0, sizeof(*r));
	if (!receive(fd, r)) {
		free(r->body);
		return false;
	}
	(void)pthread_mutex_lock(&f->lock);
	is_late = wait_if_late(f, r);
	answer(f, r, &a);
	if (is_late) {
		f->held--;
		(void)pthread_cond_broadcast(&f->changed);
	}
	is_lost = loses(f, r);
	a.has_no_body = strcmp(r->method, "HEAD") == 0;
	goes_on = !is_lost && send_answer(f, fd, &a); /* under the lock: it may send an object's own memory */
	(void)pthread_mutex_unlock(&f->lock);
	free(a.text);
	free(r->body);
	return goes_on;
}

struct serve_arg {
	struct s3_fake *f;
	int fd;
};

static void *serve(void *p)
{
	struct serve_arg arg = *(struct serve_arg *)p;
	struct request *r = malloc(sizeof(*r));

	free(p);
	must(r);
	while (serve_one(arg.f, arg.fd, r))
		;
	free(r);
	(void)shutdown(arg.fd, SHUT_RDWR);
	return NULL;
}

static void *accept_all(void *p)
{
	struct s3_fake *f = p;
	int on = 1;

	for (;;) {
		int fd = accept(f->fd, NULL, NULL);
		struct serve_arg *arg;

		(void)pthread_mutex_lock(&f->lock);
		if (fd < 0 || f->is_stopping) {
			(void)pthread_mutex_unlock(&f->lock);
			if (fd >= 0)
				close(fd);
			return NULL;
		}
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		arg = malloc(sizeof(*arg));
		must(arg && f->conns_n < FAKE_CONNS_MAX);
		*arg = (struct serve_arg){ f, fd };
		f->conn[f->conns_n].fd = fd;
		must(pthread_create(&f->conn[f->conns_n].thread, NULL, serve, arg) == 0);
		f->conns_n++;
		(void)pthread_mutex_unlock(&f->lock);
	}
}

struct s3_fake *s3_fake_start(void)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t len = sizeof(a);
	struct s3_fake *f = calloc(1, sizeof(*f));

	must(f);
	f->objects = calloc(FAKE_OBJECTS_MAX + 1, sizeof(*f->objects));
	f->page = 1000;
	f->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	must(f->objects && f->fd >= 0 && bind(f->fd, (struct sockaddr *)&a, sizeof(a)) == 0);
	must(listen(f->fd, 64) == 0 && getsockname(f->fd, (struct sockaddr *)&a, &len) == 0);
	f->port = ntohs(a.sin_port);
	must(pthread_mutex_init(&f->lock, NULL) == 0 && pthread_cond_init(&f->changed, NULL) == 0);
	must(pthread_create(&f->thread, NULL, accept_all, f) == 0);
	return f;
}

void s3_fake_stop(struct s3_fake *f)
{
	(void)pthread_mutex_lock(&f->lock);
	f->is_stopping = true;
	(void)pthread_cond_broadcast(&f->changed);
	(void)pthread_mutex_unlock(&f->lock);
	(void)shutdown(f->fd, SHUT_RDWR); /* ends accept() */
	(void)pthread_join(f->thread, NULL);
	for (unsigned i = 0; i < f->conns_n; i++) {
		(void)shutdown(f->conn[i].fd, SHUT_RDWR);
		(void)pthread_join(f->conn[i].thread, NULL);
		close(f->conn[i].fd);
	}
	close(f->fd);
	while (f->objects_n > 0)
		removed(f, f->objects[0].key);
	free(f->objects);
	(void)pthread_cond_destroy(&f->changed);
	(void)pthread_mutex_destroy(&f->lock);
	free(f);
}
