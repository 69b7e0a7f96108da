/* SPDX-License-Identifier: GPL-3.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "shard_help.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/reactor.h"

void shard_check(const char *text, uint64_t size, int (*fn)(void *run))
{
	const struct conform what = {
		.text = text, .size = size, .is_volume = true, .in_chain = true
	};

	conform_must(&what, fn);
}

struct ext shard_at(uint64_t off, uint64_t len)
{
	return (struct ext){ &obj_none, off, len };
}

static void add_asked(void *arg, struct layer *l, unsigned depth, const struct ch_stats *sum)
{
	struct shard_asked *a = arg;

	for (unsigned i = 0; depth == 1 && i < CH_OPS; i++) {
		a->ops[i] = atomic_load(&sum->ops[i]);
		a->bytes[i] = atomic_load(&sum->bytes[i]);
	}
}

struct shard_asked shard_asked(struct run *r)
{
	struct shard_asked a = { 0 };

	chain_each(r->chain, add_asked, &a);
	return a;
}

/* What was asked for since `before`. */
struct shard_asked shard_asked_since(struct run *r, const struct shard_asked *before)
{
	struct shard_asked a = shard_asked(r);

	for (unsigned i = 0; i < CH_OPS; i++) {
		a.ops[i] -= before->ops[i];
		a.bytes[i] -= before->bytes[i];
	}
	return a;
}

/* Waits until a number of the status is at least `least`. */
int shard_wait_status(struct run *r, const char *key, uint64_t least)
{
	const uint64_t deadline = now_ns() + UINT64_C(20000000000);

	while (run_status(r, key) < least) {
		EXPECT(r, now_ns() < deadline, "%s never reached %" PRIu64, key, least);
		co_sleep(1000000);
	}
	return 0;
}

int shard_flush(struct run *r)
{
	struct chan *c = run_chan(r);

	return c ? ch_flush(c) : -EIO;
}

/* All of `len` bytes the same, as the model knows then. */
int shard_fill(struct run *r, uint64_t off, uint64_t len, uint8_t byte)
{
	struct chan *c = run_chan(r);
	_cleanup_free_ uint8_t *buf = malloc(len);
	struct iovec v;
	struct iov iov = iov_one(&v, buf, len);
	int rc;

	if (!c || !buf)
		return -1;
	memset(buf, byte, len);
	rc = ch_write(c, shard_at(off, len), &iov, 0);
	if (!rc)
		memset(r->model + off, byte, len);
	return rc;
}

/* The store at the end of the chain, past everything. */
static CO_FN int open_store(struct run *r, struct chan **out)
{
	struct layer *l = chain_top(r->chain);

	while (l->kids_n)
		l = l->kids[0];
	EXPECT(r, layer_chan_open(l, out) == 0, "the store's channel");
	return 0;
}

/* 0, -ENOENT; the object of shard n as far as it goes, zeroes behind. */
static CO_FN int read_object(struct chan *store, uint64_t n, uint8_t *to, uint64_t len)
{
	struct iovec v;
	struct iov iov = iov_one(&v, to, len);
	struct obj obj;

	shard_obj(&obj, n);
	return ch_read(store, (struct ext){ &obj, 0, len }, &iov, 0);
}

/* The disk as a crash would leave it. Shards of `shard` bytes. */
int shard_read_image(struct run *r, uint8_t *image, uint64_t shard)
{
	struct chan *store = NULL;
	int rc = open_store(r, &store);

	for (uint64_t n = 0; n * shard < r->what->size && !rc; n++) {
		uint64_t len = MIN(shard, r->what->size - n * shard);

		rc = read_object(store, n, image + n * shard, len);
		if (rc == -ENOENT) {
			memset(image + n * shard, 0, len);
			rc = 0;
		}
	}
	if (store)
		layer_chan_close(store);
	return rc;
}

/* The store has all that was written. */
int shard_check_image(struct run *r, uint64_t shard)
{
	_cleanup_free_ uint8_t *image = malloc(r->what->size);

	EXPECT(r, image, "no memory");
	EXPECT(r, shard_read_image(r, image, shard) == 0, "image");
	for (uint64_t i = 0; i < r->what->size; i++)
		EXPECT(r, image[i] == r->model[i],
		       "byte %" PRIu64 " of the store is %02x, not %02x", i, image[i], r->model[i]);
	return 0;
}

/* Size of the object, or -errno. */
int64_t shard_object_size(struct run *r, uint64_t n)
{
	struct chan *store = NULL;
	struct obj_stat st;
	struct obj obj;
	int rc = open_store(r, &store);

	if (rc)
		return rc;
	shard_obj(&obj, n);
	rc = ch_stat(store, &obj, &st);
	layer_chan_close(store);
	return rc ? rc : (int64_t)st.size;
}

int shard_break_store(struct run *r, bool is_broken)
{
	char path[300];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/broken", r->folder);
	if (!is_broken) {
		EXPECT(r, unlink(path) == 0, "%s", path);
		return 0;
	}
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	EXPECT(r, fd >= 0, "%s", path);
	close(fd);
	return 0;
}
