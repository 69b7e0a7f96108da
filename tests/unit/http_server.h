/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A small HTTP/1.1 server for tests, on a free port of 127.0.0.1: a thread for each connection, answers by path.
 *
 *	/fixed		"hello", with every header that the client reads
 *	/data[-*]	the pattern (http_pattern), with ranges, ETag and Last-Modified; see struct http_server
 *	/put		takes a body, which must be the pattern; answers its length
 *	/chunked	"hello" in chunks, with a trailer
 *	/continue	100, then "hello"
 *	/last		"hello", then closes without having said so
 *	/status/NNN	that status, with a text and Retry-After: 7
 *	/long-error	404 with 200,000 bytes of text
 *	/redirect	301
 *	/early		announces 100 bytes, sends 10, closes
 *	/reset		closes without an answer
 *	/garbage	something that is not HTTP
 *	/stall		no answer until the client goes
 *	/stall-body	the head and 10 of 100 bytes, then nothing
 *	/gate		"hello" once `gate_n` requests wait here at the same time
 *	/echo		the request's head as the body
 */
#ifndef NBDRS_HTTP_SERVER_H
#define NBDRS_HTTP_SERVER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SERVER_CONNS_MAX = 2048, SERVER_HEAD_MAX = 8192 };

struct http_server {
	int port;
	/* What /data is like; changed by a test between requests only. */
	_Atomic unsigned data_len, gate_n;
	_Atomic int etag;        /* the number in its ETag; < 0: none */
	_Atomic bool has_ranges; /* else 200 and all of it */
	_Atomic bool has_head;   /* else HEAD is 405 */
	_Atomic int modified;    /* seconds of its Last-Modified; 0: none */
	_Atomic bool has_total;  /* in Content-Range */
	_Atomic bool is_encoded; /* Content-Encoding: gzip (it is not) */
	_Atomic bool is_short;   /* ranges lack their last byte, if they have more than one */
	_Atomic bool needs_auth; /* 401 but for user "me", password "se cret" */
	/* Seen so far. */
	_Atomic unsigned conns, requests, at_gate, at_gate_max;

	int fd;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t gate;
	bool is_stopping;
	struct {
		int fd;
		pthread_t thread;
	} conn[SERVER_CONNS_MAX];
	unsigned conns_n;
};

/* Asserts that it works. */
struct http_server *http_server_start(void);
void http_server_stop(struct http_server *s);

/* Byte `off` of the pattern. */
static inline uint8_t http_pattern(uint64_t off)
{
	return (uint8_t)(off * 31 + (off >> 8) * 7 + (off >> 16));
}

#endif
