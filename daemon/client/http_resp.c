/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What comes back: the head line by line, the body, and what codes mean. Nothing here waits or calls curl (but for
 * its parser of dates). Everything is the server's word, so every number is checked and every text has a limit.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "client/http_int.h"
#include "nbdrs/layer.h"

/* Of the body of an error: what is beyond is read, so that the connection can be used again, and dropped. */
enum { ERROR_TEXT_MAX = 64 << 10, TEXT_ROOM_MIN = 1024, STATUS_LEN = 3, RETRY_AFTER_MAX_S = 86400 };

void resp_init(struct http_resp *r)
{
	r->status = 0;
	r->body_len = 0;
	r->content_len = UINT64_MAX;
	r->has_range = false;
	r->range_from = r->range_to = 0;
	r->range_total = UINT64_MAX;
	r->retry_after_ns = 0;
	r->date = 0;
	r->etag[0] = r->region[0] = r->location[0] = r->last_modified[0] = r->error[0] = '\0';
	r->accepts_ranges = r->is_encoded = false;
	r->text = NULL;
	r->text_len = 0;
}

void http_resp_free(struct http_resp *resp)
{
	free(resp->text);
	resp->text = NULL;
	resp->text_len = 0;
}

/* ---- the head ---- */

/* A piece of text that is not NUL-terminated. */
struct span {
	const char *at;
	size_t len;
};

static struct span trim(struct span s)
{
	while (s.len > 0 && isspace((unsigned char)s.at[0])) {
		s.at++;
		s.len--;
	}
	while (s.len > 0 && isspace((unsigned char)s.at[s.len - 1]))
		s.len--;
	return s;
}

static bool is_word(struct span s, const char *word)
{
	return s.len == strlen(word) && strncasecmp(s.at, word, s.len) == 0;
}

/* Takes decimal digits off the front. False when there are none, or too many. */
static bool take_number(struct span *s, uint64_t *out)
{
	uint64_t v = 0;
	size_t n = 0;

	for (; n < s->len && isdigit((unsigned char)s->at[n]); n++)
		if (__builtin_mul_overflow(v, UINT64_C(10), &v) ||
		    __builtin_add_overflow(v, (uint64_t)(s->at[n] - '0'), &v))
			return false;
	s->at += n;
	s->len -= n;
	*out = v;
	return n > 0;
}

static bool take_char(struct span *s, char c)
{
	if (s->len == 0 || s->at[0] != c)
		return false;
	s->at++;
	s->len--;
	return true;
}

/* Leaves `out` empty when it does not fit: half an ETag could be taken for another one. */
static void copy_text(char *out, size_t room, struct span s)
{
	if (s.len >= room)
		s.len = 0;
	memcpy(out, s.at, s.len);
	out[s.len] = '\0';
}

static void take_status(struct http_resp *r, struct span s)
{
	uint64_t status = 0;

	while (s.len > 0 && s.at[0] != ' ')
		(void)take_char(&s, s.at[0]);
	s = trim(s);
	s.len = s.len < STATUS_LEN ? s.len : STATUS_LEN;
	(void)take_number(&s, &status); /* curl has refused what is not HTTP already */
	r->status = (int)status;
}

/* "bytes 0-99/1234", "bytes 0-99/ *" (unknown), "bytes * /1234" (416); RFC 9110, 14.4. */
static void take_range(struct http_resp *r, struct span s)
{
	uint64_t from = 0, last = 0, total = UINT64_MAX;

	if (s.len < 6 || strncasecmp(s.at, "bytes ", 6) != 0)
		return;
	s = trim((struct span){ s.at + 6, s.len - 6 });
	if (take_char(&s, '*')) {
		if (take_char(&s, '/') && take_number(&s, &total))
			r->range_total = total;
		return;
	}
	if (!take_number(&s, &from) || !take_char(&s, '-') || !take_number(&s, &last) ||
	    !take_char(&s, '/') || last < from || last == UINT64_MAX)
		return;
	if (!take_char(&s, '*') && (!take_number(&s, &total) || total <= last))
		return;
	r->has_range = true;
	r->range_from = from;
	r->range_to = last + 1;
	r->range_total = total;
}

static time_t parse_date(struct span s)
{
	char text[HTTP_DATE_MAX];
	time_t at;

	copy_text(text, sizeof(text), s);
	at = curl_getdate(text, NULL);
	return at < 0 ? 0 : at;
}

/* Seconds, or a date (RFC 9110, 10.2.3). */
static void take_retry_after(struct http_resp *r, struct span s)
{
	struct span rest = s;
	uint64_t seconds = 0;

	if (!take_number(&rest, &seconds) || rest.len > 0) {
		time_t at = parse_date(s), now = time(NULL);

		seconds = at > now ? (uint64_t)(at - now) : 0;
	}
	if (seconds > RETRY_AFTER_MAX_S)
		seconds = RETRY_AFTER_MAX_S;
	r->retry_after_ns = seconds * 1000000000;
}

static void take_etag(struct http_resp *r, struct span s)
{
	if (s.len >= 2 && s.at[0] == 'W' && s.at[1] == '/')
		s = (struct span){ s.at + 2, s.len - 2 };
	if (s.len >= 2 && s.at[0] == '"' && s.at[s.len - 1] == '"')
		s = (struct span){ s.at + 1, s.len - 2 };
	copy_text(r->etag, sizeof(r->etag), s);
}

static void take_field(struct http_resp *r, struct span name, struct span value)
{
	struct span rest = value;
	uint64_t n;

	if (is_word(name, "content-length")) {
		if (take_number(&rest, &n) && rest.len == 0)
			r->content_len = n;
	} else if (is_word(name, "content-range")) {
		take_range(r, value);
	} else if (is_word(name, "etag")) {
		take_etag(r, value);
	} else if (is_word(name, "last-modified")) {
		copy_text(r->last_modified, sizeof(r->last_modified), value);
	} else if (is_word(name, "date")) {
		/* Of errors only: nobody asks for it otherwise, and it costs half a microsecond. */
		r->date = r->status >= 400 ? parse_date(value) : 0;
	} else if (is_word(name, "retry-after")) {
		take_retry_after(r, value);
	} else if (is_word(name, "accept-ranges")) {
		r->accepts_ranges = is_word(value, "bytes");
	} else if (is_word(name, "content-encoding")) {
		r->is_encoded = value.len > 0 && !is_word(value, "identity");
	} else if (is_word(name, "location")) {
		copy_text(r->location, sizeof(r->location), value);
	} else if (is_word(name, "x-amz-bucket-region")) {
		copy_text(r->region, sizeof(r->region), value);
	}
}

void resp_line(struct http_resp *r, const char *line, size_t len)
{
	struct span s = trim((struct span){ line, len });
	const char *colon;

	if (s.len > 5 && memcmp(s.at, "HTTP/", 5) == 0) {
		/* After a 100 (Continue), say, comes the real one: nothing of the former may stay. */
		http_resp_free(r);
		resp_init(r);
		take_status(r, s);
		return;
	}
	colon = memchr(s.at, ':', s.len);
	if (colon == NULL)
		return;
	len = (size_t)(colon - s.at);
	take_field(r, trim((struct span){ s.at, len }),
		   trim((struct span){ colon + 1, s.len - len - 1 }));
}

/* ---- the body ---- */

static int add_text(struct transfer *t, const char *data, size_t len)
{
	struct http_resp *r = t->resp;

	if (r->text == NULL)
		t->text_room = 0;
	if (r->text_len + len + 1 > t->text_room) {
		size_t room = t->text_room > 0 ? t->text_room : TEXT_ROOM_MIN;
		char *text;

		while (room < r->text_len + len + 1)
			room *= 2;
		text = realloc(r->text, room);
		if (text == NULL)
			return -ENOMEM;
		r->text = text;
		t->text_room = room;
	}
	memcpy(r->text + r->text_len, data, len);
	r->text_len += len;
	r->text[r->text_len] = '\0';
	return 0;
}

int resp_body(struct transfer *t, const char *data, size_t len)
{
	struct http_resp *r = t->resp;
	bool is_good = r->status >= 200 && r->status < 300;
	int rc = 0;

	if (is_good && t->req->into != NULL) {
		size_t room = t->req->into->len;

		/* The announced length first: a whole disk in the place of 4 KiB ends before it begins. */
		if ((r->content_len != UINT64_MAX && r->content_len > room) ||
		    len > room - r->body_len)
			return -EPROTO;
		(void)iov_copy_in(t->req->into, r->body_len, data, len);
	} else if (r->body_len + len > HTTP_TEXT_MAX) {
		return -EPROTO;
	} else if (is_good) {
		rc = add_text(t, data, len);
	} else if (r->text_len < ERROR_TEXT_MAX) {
		rc = add_text(t, data, MIN(len, ERROR_TEXT_MAX - r->text_len));
	}
	if (rc == 0)
		r->body_len += len;
	return rc;
}

/* ---- what codes mean ---- */

int http_status_error(int status)
{
	if (status >= 200 && status < 300)
		return 0;
	switch (status) {
	case 408:
	case 429:
	case 500:
	case 502:
	case 503:
	case 504: return -EAGAIN;
	case 404:
	case 410: return -ENOENT;
	case 401:
	case 403: return -EACCES;
	case 412: return -ESTALE;
	case 409: return -EBUSY;
	case 416: return -ERANGE;
	case 507: return -ENOSPC;
	case 301:
	case 302:
	case 307:
	case 308: return -EREMCHG;
	case 405:
	case 501: return -EOPNOTSUPP;
	default: break;
	}
	return status >= 400 && status < 500 ? -EINVAL : -EPROTO;
}

/* The system's word on a connection that did not come about. */
static int connect_error(long os_errno)
{
	switch (os_errno) {
	case EHOSTUNREACH:
	case ENETUNREACH:
	case EHOSTDOWN:
	case ENETDOWN:
	case EADDRNOTAVAIL: return -EHOSTUNREACH;
	case ETIMEDOUT: return -ETIMEDOUT;
	case EMFILE:
	case ENFILE:
	case ENOBUFS:
	case ENOMEM: return -ENOMEM;
	default: return -ECONNREFUSED;
	}
}

int resp_error(CURLcode code, long os_errno)
{
	switch (code) {
	case CURLE_OK: return 0;
	case CURLE_OPERATION_TIMEDOUT: return -ETIMEDOUT;
	case CURLE_COULDNT_CONNECT: return connect_error(os_errno);
	case CURLE_COULDNT_RESOLVE_HOST:
	case CURLE_COULDNT_RESOLVE_PROXY:
	case CURLE_INTERFACE_FAILED: return -EHOSTUNREACH;
	case CURLE_RECV_ERROR:
	case CURLE_SEND_ERROR:
	case CURLE_SEND_FAIL_REWIND:
	case CURLE_GOT_NOTHING:
	case CURLE_PARTIAL_FILE:
	case CURLE_UPLOAD_FAILED:
	case CURLE_AGAIN:
	case CURLE_HTTP2:
	case CURLE_HTTP2_STREAM:
	case CURLE_NO_CONNECTION_AVAILABLE: return -ECONNRESET;
	case CURLE_PEER_FAILED_VERIFICATION:
	case CURLE_SSL_CERTPROBLEM:
	case CURLE_SSL_CACERT_BADFILE:
	case CURLE_SSL_CRL_BADFILE:
	case CURLE_SSL_ISSUER_ERROR:
	case CURLE_SSL_INVALIDCERTSTATUS:
	case CURLE_SSL_PINNEDPUBKEYNOTMATCH: return -EKEYREJECTED;
	case CURLE_OUT_OF_MEMORY: return -ENOMEM;
	case CURLE_URL_MALFORMAT:
	case CURLE_LOGIN_DENIED: return -EINVAL;
	default: return -EPROTO;
	}
}

static void add_count(void *arg, const char *method, int status, uint64_t n)
{
	struct info *i = arg;
	char key[48], value[32];

	if (status != 0)
		(void)snprintf(key, sizeof(key), "%s %d", method, status);
	else
		(void)snprintf(key, sizeof(key), "%s without an answer", method);
	(void)snprintf(value, sizeof(value), "%" PRIu64, n);
	i->add(i, key, value);
}

void http_show_counts(struct http *h, struct info *i)
{
	http_each_count(h, add_count, i);
}
