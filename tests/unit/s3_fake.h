/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * An S3 server for unit tests, with the habits of servers that RadosGW does not show: objects in
 * memory, one bucket, path style, a thread for each connection. It looks at dates, body hashes and
 * the access key, and takes any signature.
 */
#ifndef NBDRS_TEST_S3_FAKE_H
#define NBDRS_TEST_S3_FAKE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FAKE_CONNS_MAX = 256, FAKE_OBJECTS_MAX = 4096, FAKE_HEAD_MAX = 16384 };

#define FAKE_KEY    "fakekey"
#define FAKE_SECRET "fakes3cret"

enum fake_cond {
	COND_ATOMIC,     /* 412 */
	COND_CONFLICT,   /* 409 */
	COND_IGNORED,    /* 200, and the object is replaced */
	COND_UNKNOWN,    /* 501 */
	COND_ONLY_ABSENT /* If-Match is ignored */
};

enum fake_ranges { RANGES_FINE, RANGES_IGNORED, RANGES_SHIFTED, RANGES_SHORT };

struct fake_object {
	char *key;
	uint8_t *data;
	size_t len;
	unsigned version; /* its ETag */
};

struct s3_fake {
	int port;

	/* Habits; guarded by lock. */
	enum fake_cond cond;
	enum fake_ranges ranges;
	bool has_no_multi_delete, has_no_etags, is_public, repeats_token;
	bool has_md5_etags;  /* the bytes' MD5, as most servers', instead of a version's number */
	bool renames_etags;  /* answers to HEAD and GET have others than puts are compared with */
	/* So many puts are done, after `lose_after` more, and the connection ends without an answer. */
	unsigned lose_puts, lose_after;
	unsigned page;           /* keys on a page of a listing */
	int64_t clock_off_s;     /* of its clock */
	const char *token;       /* the session token it wants; NULL = none */
	const char *undeletable; /* a key */
	/* See s3_fake_force. */
	_Atomic unsigned forced_n;
	const char *forced_method, *forced_headers, *forced_last;
	char forced_body[256];
	int forced_status;
	/* See s3_fake_hold; guarded by lock, as what it counts. */
	const char *held_method;
	unsigned hold_n, held, releases;
	pthread_cond_t changed;

	/* Seen. */
	_Atomic unsigned requests, heads, puts, skewed, bad_hashes, unsigned_requests,
		multi_deletes, deletes, lists;
	_Atomic bool is_unsorted; /* a query was not in canonical order */

	struct fake_object *objects; /* sorted by key; guarded by lock */
	unsigned objects_n, versions;
	pthread_mutex_t lock;
	int fd;
	pthread_t thread;
	bool is_stopping;
	struct {
		int fd;
		pthread_t thread;
	} conn[FAKE_CONNS_MAX];
	unsigned conns_n;
};

/* Asserts that it works. */
struct s3_fake *s3_fake_start(void);
void s3_fake_stop(struct s3_fake *f);
/* Puts an object there, past the network. */
void s3_fake_put(struct s3_fake *f, const char *key, const void *data, size_t len);
bool s3_fake_has(struct s3_fake *f, const char *key);
unsigned s3_fake_count(struct s3_fake *f);
/*
 * The next n requests of that method ("" = any) are answered so. headers (lines with CR LF, borrowed)
 * and body may be NULL.
 */
void s3_fake_force(struct s3_fake *f, unsigned n, const char *method, int status,
		   const char *headers, const char *body);
/* The last of them with status 400 and this code (borrowed) instead. */
void s3_fake_force_last(struct s3_fake *f, const char *code);
/*
 * The next n requests of that method are taken whole and kept: nothing is done about them, and nothing answered, until
 * s3_fake_release(), which returns when all that were kept have been done. s3_fake_wait_held() returns when n of them
 * are there; it blocks its thread.
 */
void s3_fake_hold(struct s3_fake *f, unsigned n, const char *method);
void s3_fake_wait_held(struct s3_fake *f, unsigned n);
void s3_fake_release(struct s3_fake *f);
/* Is the object there, and are these its bytes? */
bool s3_fake_is(struct s3_fake *f, const char *key, const char *text);

#endif
