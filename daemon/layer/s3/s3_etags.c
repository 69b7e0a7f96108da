/* SPDX-License-Identifier: GPL-3.0-or-later */
#include "layer/s3/s3_etags.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct entry {
	uint64_t hash;
	uint8_t known; /* enum s3_known; S3_UNKNOWN = free */
	char etag[S3_ETAG_LEN_MAX + 1];
};

_Static_assert(sizeof(struct entry) == 64, "a line of the CPU's cache");

/* A set is in the order of use, latest first; free entries may be anywhere. */
struct s3_etags {
	pthread_mutex_t lock; /* one for all: a request to a store takes a thousand times as long */
	unsigned sets;
	struct entry v[];
};

struct s3_etags *s3_etags_new(unsigned entries)
{
	struct s3_etags *t = calloc(1, sizeof(*t) + entries * sizeof(t->v[0]));

	if (!t)
		return NULL;
	t->sets = entries / S3_ETAGS_WAYS;
	pthread_mutex_init(&t->lock, NULL);
	return t;
}

void s3_etags_free(struct s3_etags *t)
{
	if (!t)
		return;
	pthread_mutex_destroy(&t->lock);
	free(t);
}

/*
 * The object's entry, moved to the front of its set; with `make` a free one, or the one that makes room, if there is
 * none. With the lock held.
 */
static struct entry *look(struct s3_etags *t, const struct obj *obj, bool make)
{
	/* Multiplied (Knuth, 6.4), because FNV lets the last characters, by which names differ, into few bits. */
	const uint64_t mixed = (obj->hash * UINT64_C(0x9e3779b97f4a7c15)) >> 32;
	struct entry *set = &t->v[mixed % t->sets * S3_ETAGS_WAYS];
	struct entry found;
	unsigned at = 0, free_at = S3_ETAGS_WAYS - 1;

	while (at < S3_ETAGS_WAYS && !(set[at].known && set[at].hash == obj->hash)) {
		if (!set[at].known && set[free_at].known)
			free_at = at;
		at++;
	}
	if (at == S3_ETAGS_WAYS) {
		if (!make)
			return NULL;
		at = free_at;
		set[at] = (struct entry){ .hash = obj->hash };
	}
	found = set[at];
	memmove(set + 1, set, at * sizeof(*set));
	set[0] = found;
	return set;
}

static void store(struct s3_etags *t, const struct obj *obj, const char *etag, bool only_if_unknown)
{
	const size_t len = etag ? strlen(etag) : 0;
	struct entry *e;

	if (etag && (len == 0 || len > S3_ETAG_LEN_MAX)) {
		if (!only_if_unknown)
			s3_etags_forget(t, obj);
		return;
	}
	pthread_mutex_lock(&t->lock);
	e = look(t, obj, true);
	if (!e->known || !only_if_unknown) {
		e->known = etag ? S3_THERE : S3_ABSENT;
		if (etag)
			memcpy(e->etag, etag, len + 1);
	}
	pthread_mutex_unlock(&t->lock);
}

enum s3_known s3_etags_get(struct s3_etags *t, const struct obj *obj, char *etag)
{
	enum s3_known known = S3_UNKNOWN;
	const struct entry *e;

	pthread_mutex_lock(&t->lock);
	e = look(t, obj, false);
	if (e) {
		known = (enum s3_known)e->known;
		memcpy(etag, e->etag, sizeof(e->etag));
	}
	pthread_mutex_unlock(&t->lock);
	return known;
}

void s3_etags_put(struct s3_etags *t, const struct obj *obj, const char *etag)
{
	store(t, obj, etag, false);
}

void s3_etags_del(struct s3_etags *t, const struct obj *obj)
{
	store(t, obj, NULL, false);
}

void s3_etags_saw(struct s3_etags *t, const struct obj *obj, const char *etag)
{
	store(t, obj, etag, true);
}

void s3_etags_forget(struct s3_etags *t, const struct obj *obj)
{
	struct entry *e;

	pthread_mutex_lock(&t->lock);
	e = look(t, obj, false);
	if (e)
		e->known = S3_UNKNOWN;
	pthread_mutex_unlock(&t->lock);
}
