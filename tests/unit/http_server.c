/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "http_server.h"

#include <arpa/inet.h>
#include <assert.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

/* One request. */
struct request {
	struct http_server *server;
	int fd;
	char head[SERVER_HEAD_MAX];
	size_t len;      /* of what was received */
	size_t head_len; /* of it, with the empty line */
	char method[16], path[256];
};

static bool send_all(int fd, const void *data, size_t len)
{
	for (size_t done = 0; done < len;) {
		ssize_t n = send(fd, (const char *)data + done, len - done, MSG_NOSIGNAL);

		if (n <= 0)
			return false;
		done += (size_t)n;
	}
	return true;
}

static bool send_text(int fd, const char *text)
{
	return send_all(fd, text, strlen(text));
}

/* The value of a header, up to the end of its line; NULL. */
static const char *header(const struct request *q, const char *name)
{
	size_t len = strlen(name);

	for (const char *at = strstr(q->head, "\r\n"); at; at = strstr(at + 2, "\r\n"))
		if (strncasecmp(at + 2, name, len) == 0 && at[2 + len] == ':')
			return at + 2 + len + 1 + strspn(at + 2 + len + 1, " ");
	return NULL;
}

static bool wait_for_end(const struct request *q)
{
	char byte;

	(void)!recv(q->fd, &byte, 1, 0); /* 0 when the client goes */
	return false;
}

static bool send_pattern(int fd, size_t from, size_t to)
{
	char *all = malloc(to - from + 1);
	bool good;

	for (size_t i = from; i < to; i++)
		all[i - from] = (char)http_pattern(i);
	good = send_all(fd, all, to - from);
	free(all);
	return good;
}

/* ---- answers: false = the connection ends ---- */

static bool hello(const struct request *q)
{
	return send_text(q->fd, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
}

static bool fixed(const struct request *q)
{
	return send_text(q->fd, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: W/\"e1\"\r\n"
				"Date: Thu, 01 Jan 1970 00:01:40 GMT\r\nAccept-Ranges: bytes\r\n"
				"X-Amz-Bucket-Region: eu-west-9\r\nLocation: /there\r\n"
				"Last-Modified: Thu, 01 Jan 1970 00:00:10 GMT\r\n\r\nhello");
}

static bool is_allowed(const struct request *q)
{
	static const char *const good = "Basic bWU6c2UgY3JldA==\r\n"; /* me:se cret */
	const char *got = header(q, "Authorization");

	return !q->server->needs_auth || (got && strncmp(got, good, strlen(good)) == 0);
}

static bool data(const struct request *q)
{
	struct http_server *s = q->server;
	const char *range = header(q, "Range");
	unsigned from = 0, last = s->data_len - 1;
	bool is_head = strcmp(q->method, "HEAD") == 0, is_part;
	char head[1024], etag[64] = "", content_range[128] = "", modified[64] = "", total[16] = "*";

	if (is_head && !s->has_head)
		return send_text(q->fd, "HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n");
	if (!is_allowed(q))
		return send_text(q->fd, "HTTP/1.1 401 Who are you\r\nContent-Length: 0\r\n\r\n");
	is_part = range && s->has_ranges && sscanf(range, "bytes=%u-%u", &from, &last) == 2;
	if (is_part && from >= s->data_len)
		return send_text(q->fd, "HTTP/1.1 416 No\r\nContent-Range: bytes */0\r\n"
					"Content-Length: 0\r\n\r\n");
	last = last < s->data_len ? last : s->data_len - 1;
	if (is_part && s->is_short && last > from)
		last--;
	if (s->etag >= 0)
		(void)snprintf(etag, sizeof(etag), "ETag: \"v%d\"\r\n", s->etag);
	if (s->modified > 0)
		(void)snprintf(modified, sizeof(modified),
			       "Last-Modified: Thu, 01 Jan 1970 00:00:%02d GMT\r\n", s->modified);
	if (s->has_total)
		(void)snprintf(total, sizeof(total), "%u", s->data_len);
	if (is_part)
		(void)snprintf(content_range, sizeof(content_range),
			       "Content-Range: bytes %u-%u/%s\r\n", from, last, total);
	(void)snprintf(head, sizeof(head), "HTTP/1.1 %s\r\n%s%s%s%s%sContent-Length: %u\r\n\r\n",
		       is_part ? "206 Partial Content" : "200 OK", etag, content_range,
		       s->has_ranges ? "Accept-Ranges: bytes\r\n" : "", modified,
		       s->is_encoded ? "Content-Encoding: gzip\r\n" : "", last - from + 1);
	return send_text(q->fd, head) && (is_head || send_pattern(q->fd, from, last + 1UL));
}

static bool put(struct request *q)
{
	const char *length = header(q, "Content-Length");
	size_t want = length ? strtoul(length, NULL, 10) : 0;
	size_t have = q->len - q->head_len, got = 0;
	char piece[16384], answer[128];
	bool is_good = length && !header(q, "Expect") && !header(q, "Transfer-Encoding");

	memcpy(piece, q->head + q->head_len, have);
	q->len = q->head_len;
	for (;;) {
		for (size_t i = 0; i < have; i++)
			is_good &= (uint8_t)piece[i] == http_pattern(got + i);
		got += have;
		if (got >= want)
			break;
		have = (size_t)recv(q->fd, piece, sizeof(piece), 0);
		if ((ssize_t)have <= 0)
			return false;
	}
	(void)snprintf(answer, sizeof(answer),
		       "HTTP/1.1 %s\r\nETag: \"new\"\r\nContent-Length: 8\r\n\r\n%8zu",
		       is_good && got == want ? "200 OK" : "400 Bad", got);
	return send_text(q->fd, answer);
}

static bool gate(const struct request *q)
{
	struct http_server *s = q->server;

	pthread_mutex_lock(&s->lock);
	s->at_gate++;
	if (s->at_gate > s->at_gate_max)
		s->at_gate_max = s->at_gate;
	pthread_cond_broadcast(&s->gate);
	while (s->at_gate_max < s->gate_n && !s->is_stopping)
		pthread_cond_wait(&s->gate, &s->lock);
	s->at_gate--;
	pthread_mutex_unlock(&s->lock);
	return hello(q);
}

static bool status(const struct request *q)
{
	char answer[256];

	(void)snprintf(answer, sizeof(answer),
		       "HTTP/1.1 %.3s So it is\r\nRetry-After: 7\r\n"
		       "Date: Thu, 01 Jan 1970 00:01:40 GMT\r\nContent-Length: 4\r\n\r\ntext",
		       q->path + strlen("/status/"));
	return send_text(q->fd, answer);
}

static bool long_error(const struct request *q)
{
	return send_text(q->fd, "HTTP/1.1 404 None\r\nContent-Length: 200000\r\n\r\n") &&
	       send_pattern(q->fd, 0, 200000);
}

static bool echo(const struct request *q)
{
	char answer[128];

	(void)snprintf(answer, sizeof(answer), "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n",
		       q->head_len);
	return send_text(q->fd, answer) && send_all(q->fd, q->head, q->head_len);
}

static bool is_path(const struct request *q, const char *path)
{
	return strcmp(q->path, path) == 0;
}

static bool starts(const struct request *q, const char *path)
{
	return strncmp(q->path, path, strlen(path)) == 0;
}

static bool answer(struct request *q)
{
	if (is_path(q, "/fixed"))
		return fixed(q);
	if (starts(q, "/data"))
		return data(q);
	if (is_path(q, "/put"))
		return put(q);
	if (starts(q, "/status/"))
		return status(q);
	if (is_path(q, "/gate"))
		return gate(q);
	if (is_path(q, "/long-error"))
		return long_error(q);
	if (starts(q, "/echo"))
		return echo(q);
	if (is_path(q, "/chunked"))
		return send_text(q->fd,
				 "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n"
				 "3\r\nllo\r\n0\r\nETag: \"trailer\"\r\n\r\n");
	if (is_path(q, "/continue"))
		return send_text(q->fd, "HTTP/1.1 100 Continue\r\nETag: \"none\"\r\n\r\n") &&
		       hello(q);
	if (is_path(q, "/redirect"))
		return send_text(q->fd, "HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\n"
					"Content-Length: 0\r\n\r\n");
	if (is_path(q, "/early")) {
		(void)send_text(q->fd, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n0123456789");
		return false;
	}
	if (is_path(q, "/garbage")) {
		(void)send_text(q->fd, "220 mail.example ESMTP\r\n");
		return false;
	}
	if (is_path(q, "/last")) {
		(void)hello(q);
		return false;
	}
	if (is_path(q, "/stall"))
		return wait_for_end(q);
	if (is_path(q, "/stall-body")) {
		(void)send_text(q->fd, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n0123456789");
		return wait_for_end(q);
	}
	return false; /* "/reset" */
}

/* ---- connections ---- */

static bool receive_head(struct request *q)
{
	const char *end;

	q->head[q->len] = '\0';
	while ((end = strstr(q->head, "\r\n\r\n")) == NULL) {
		ssize_t n = recv(q->fd, q->head + q->len, sizeof(q->head) - 1 - q->len, 0);

		if (n <= 0)
			return false;
		q->len += (size_t)n;
		q->head[q->len] = '\0';
		if (q->head[0] < 'A' || q->head[0] > 'Z') {
			(void)send_text(q->fd, "HTTP/1.1 400 TLS, is it?\r\n\r\n");
			return false;
		}
	}
	q->head_len = (size_t)(end + 4 - q->head);
	return sscanf(q->head, "%15s %255s", q->method, q->path) == 2;
}

static void *serve(void *arg)
{
	struct request *q = arg;
	struct http_server *s = q->server;

	while (receive_head(q)) {
		s->requests++;
		if (!answer(q))
			break;
		memmove(q->head, q->head + q->head_len, q->len - q->head_len);
		q->len -= q->head_len;
	}
	/* Closed, but for its number, which http_server_stop() still uses: that must not become another's. */
	(void)dup2(s->fd, q->fd);
	free(q);
	return NULL;
}

static void *accept_all(void *arg)
{
	struct http_server *s = arg;
	int fd;

	while ((fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
		struct request *q = calloc(1, sizeof(*q));
		int one = 1;

		assert(q != NULL && s->conns_n < SERVER_CONNS_MAX);
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		q->server = s;
		q->fd = fd;
		s->conns++;
		s->conn[s->conns_n].fd = fd;
		if (pthread_create(&s->conn[s->conns_n].thread, NULL, serve, q) != 0)
			abort();
		s->conns_n++;
	}
	return NULL;
}

struct http_server *http_server_start(void)
{
	struct http_server *s = calloc(1, sizeof(*s));
	struct sockaddr_in addr = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t len = sizeof(addr);

	assert(s != NULL);
	s->data_len = 1 << 20;
	s->etag = 1;
	s->has_ranges = s->has_head = s->has_total = true;
	(void)pthread_mutex_init(&s->lock, NULL);
	(void)pthread_cond_init(&s->gate, NULL);
	s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (s->fd < 0 || bind(s->fd, (struct sockaddr *)&addr, sizeof(addr)) != 0 ||
	    listen(s->fd, 1024) != 0 || getsockname(s->fd, (struct sockaddr *)&addr, &len) != 0 ||
	    pthread_create(&s->thread, NULL, accept_all, s) != 0)
		abort();
	s->port = ntohs(addr.sin_port);
	return s;
}

void http_server_stop(struct http_server *s)
{
	(void)shutdown(s->fd, SHUT_RDWR); /* accept returns */
	pthread_join(s->thread, NULL);
	pthread_mutex_lock(&s->lock);
	s->is_stopping = true;
	pthread_cond_broadcast(&s->gate);
	pthread_mutex_unlock(&s->lock);
	for (unsigned i = 0; i < s->conns_n; i++) {
		(void)shutdown(s->conn[i].fd, SHUT_RDWR); /* receiving ends */
		pthread_join(s->conn[i].thread, NULL);
		(void)close(s->conn[i].fd);
	}
	(void)close(s->fd);
	(void)pthread_cond_destroy(&s->gate);
	(void)pthread_mutex_destroy(&s->lock);
	free(s);
}
