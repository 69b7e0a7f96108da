/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The guard. The server compares a put with the object that the put was made for: one that is late finds a newer
 * object and is refused, whoever sent it, this daemon before a time-out or one that is dead.
 *
 * What a put is made for is what was last heard of the object (s3_etags.h); a HEAD where that is nothing. It need
 * not be what is there: a put that is refused asks, and is sent again on top of that, unless what is there are its
 * own bytes. So a wrong entry costs two requests and does no harm. Puts of one object follow each other, or they
 * would refuse each other for nothing; what others do to it meanwhile ends a put after ROUNDS.
 *
 * The guard must never be the reason why a put fails. Where a server has no ETag for an object, or does not let us
 * ask, the put goes without condition; where conditions contradict what the server says, or are unknown to it all of
 * a sudden, all puts do from then on.
 */
#include "layer/s3/s3_guard.h"

#include <errno.h>
#include <string.h>
#include <strings.h>

#include "nbdrs/io.h"
#include "nbdrs/log.h"

enum {
	ROUNDS = 8,         /* of one put, before it is left to layer retry */
	CONTRADICTIONS = 2, /* of one put; a single one may be somebody else's change, there and back */
	MD5_INLINE_LEN = 32 * 1024,
};

int s3_guard_open(struct s3_self *self, const char *etag)
{
	atomic_store(&self->is_unguarded, false);
	atomic_store(&self->guard_asked, 0);
	atomic_store(&self->guard_refused, 0);
	if (!*etag || strlen(etag) > S3_ETAG_LEN_MAX)
		return 0;
	self->etags = s3_etags_new(S3_ETAGS_MAX);
	if (!self->etags)
		return -ENOMEM;
	rangelock_init(&self->putting);
	return 0;
}

void s3_guard_close(struct s3_self *self)
{
	if (!self->etags)
		return;
	rangelock_destroy(&self->putting);
	s3_etags_free(self->etags);
	self->etags = NULL;
}

bool s3_is_guarded(const struct s3_self *self)
{
	return self->etags && !atomic_load_explicit(&self->is_unguarded, memory_order_relaxed);
}

void s3_guard_status(struct s3_self *self, struct info *i)
{
	i->add(i, "guarded_puts", s3_is_guarded(self) ? "yes" : "no");
	info_number(i, "guard_asked", atomic_load_explicit(&self->guard_asked, memory_order_relaxed));
	info_number(i, "guard_refused",
		    atomic_load_explicit(&self->guard_refused, memory_order_relaxed));
}

static void give_up(struct s3_self *self, const char *why)
{
	if (!atomic_exchange(&self->is_unguarded, true))
		log_warn("s3 puts are unconditional from now on, a late one may undo a newer one: %s "
			 "endpoint=%s prefix=%s",
			 why, s3_endpoint(self->s3), self->prefix);
}

/* --- What other requests say ------------------------------------------------------------------ */

void s3_guard_saw(struct s3_self *self, const struct obj *obj, int rc, const struct s3_resp *resp)
{
	if (self->etags && (rc == 0 || rc == -ENOENT))
		s3_etags_saw(self->etags, obj, rc == 0 ? resp->http.etag : NULL);
}

void s3_guard_listed(struct s3_self *self, const struct obj *obj, const char *etag, unsigned n)
{
	/* More than there is room for would only cost time. */
	if (self->etags && n < S3_ETAGS_MAX)
		s3_etags_saw(self->etags, obj, etag);
}

void s3_guard_put_was(struct s3_self *self, const struct obj *obj, int rc, const struct s3_resp *resp)
{
	if (!self->etags)
		return;
	/* After a failure nobody knows what is there, or will be. */
	if (rc == 0)
		s3_etags_put(self->etags, obj, resp->http.etag);
	else
		s3_etags_forget(self->etags, obj);
}

void s3_guard_del_was(struct s3_self *self, const struct obj *objs, unsigned n, int rc)
{
	/* That many are not there would fill the table, and who deletes many at once knows it. */
	const bool is_noted = rc == 0 && n == 1;

	for (unsigned i = 0; self->etags && i < n; i++) {
		if (is_noted)
			s3_etags_del(self->etags, &objs[i]);
		else
			s3_etags_forget(self->etags, &objs[i]);
	}
}

/* --- One put ---------------------------------------------------------------------------------- */

struct guarded {
	struct chan *c;
	struct s3_self *self;
	const struct put *p;
	struct s3_req *req;
	struct s3_resp *resp;

	/* What the put is made for. */
	enum s3_known known;
	char etag[S3_ETAG_LEN_MAX + 1]; /* of S3_THERE */
	uint64_t size;                  /* the same, if the server was asked */
	bool is_free;                   /* without condition, whatever is there */
	unsigned contradictions;
};

static void count(_Atomic uint64_t *counter)
{
	atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

/* Asks what is there. 0, also when it can't be told (is_free); an error that may pass. */
static CO_FN int ask(struct guarded *g)
{
	const struct s3_req req = { .method = "HEAD", .key = g->req->key };
	const struct http_resp *http = &g->resp->http;
	int rc;

	count(&g->self->guard_asked);
	http_resp_free(&g->resp->http);
	rc = s3_do(g->self->s3, &req, g->resp, &g->c->not_before);
	if (is_transient(rc) || rc == -ENOMEM)
		return rc;
	g->known = rc == 0 ? S3_THERE : S3_ABSENT;
	if (rc == 0 && http->etag[0] && strlen(http->etag) <= S3_ETAG_LEN_MAX) {
		memcpy(g->etag, http->etag, strlen(http->etag) + 1);
		g->size = http->content_len;
		s3_etags_put(g->self->etags, g->p->obj, g->etag);
	} else if (rc == -ENOENT) {
		s3_etags_del(g->self->etags, g->p->obj);
	} else {
		g->is_free = true;
	}
	return 0;
}

static CO_FN int send_put(struct guarded *g)
{
	g->req->cond = g->is_free		? PUT_ALWAYS
		       : g->known == S3_ABSENT ? PUT_IF_ABSENT
					       : PUT_IF_MATCH;
	g->req->etag = g->etag;
	g->req->may_repeat = true;
	http_resp_free(&g->resp->http);
	return s3_do(g->self->s3, g->req, g->resp, &g->c->not_before);
}

struct md5_job {
	const struct iov *iov;
	char out[S3_MD5_LEN + 1];
};

static int md5_job(void *arg)
{
	struct md5_job *job = arg;

	return s3_md5_hex(job->iov, job->out);
}

/* Is what was found what is put? Then a copy of the put has come through, or its bytes were there already. */
static CO_FN bool is_done(const struct guarded *g)
{
	struct md5_job job = { .iov = g->p->iov };
	int rc;

	if (g->known != S3_THERE || g->size != g->p->iov->len || strlen(g->etag) != S3_MD5_LEN)
		return false;
	rc = g->size <= MD5_INLINE_LEN ? md5_job(&job) : offload(md5_job, &job);
	return rc == 0 && strcasecmp(job.out, g->etag) == 0;
}

/* After a refusal: 1 = the put is done all the same, 0 = it has something new to be made for, or an error. */
static CO_FN int look_again(struct guarded *g)
{
	const enum s3_known known = g->known;
	const bool is_conflict = g->resp->http.status == 409; /* "not now", on some servers */
	char etag[S3_ETAG_LEN_MAX + 1];
	int rc;

	memcpy(etag, g->etag, sizeof(etag));
	count(&g->self->guard_refused);
	rc = ask(g);
	if (rc || g->is_free)
		return rc;
	if (is_done(g))
		return 1;
	if (!is_conflict && g->known == known &&
	    (known == S3_ABSENT || strcmp(etag, g->etag) == 0) &&
	    ++g->contradictions == CONTRADICTIONS) {
		give_up(g->self, "the server refuses a put on the very object that it says is there");
		g->is_free = true;
	}
	return 0;
}

static int complain(const struct guarded *g)
{
	static struct log_gate gate;
	unsigned suppressed;

	if (log_gate_open(&gate, &suppressed))
		log_warn("s3 put is refused again and again, somebody else keeps changing the object "
			 "endpoint=%s object=%s suppressed=%u",
			 s3_endpoint(g->self->s3), g->req->key, suppressed);
	return -EAGAIN;
}

static CO_FN int put_on(struct guarded *g)
{
	bool has_none = false; /* the server, conditions */

	for (unsigned round = 0; round < ROUNDS; round++) {
		int rc = g->known == S3_UNKNOWN ? ask(g) : 0;

		if (rc)
			return rc;
		rc = send_put(g);
		if (rc == -ENOTSUP && !g->is_free) {
			has_none = g->is_free = true;
			continue;
		}
		if (rc == 0 && has_none)
			give_up(g->self, "the server does not know conditions any more");
		if (rc != -EEXIST && rc != -ESTALE) {
			s3_guard_put_was(g->self, g->p->obj, rc, g->resp);
			return rc;
		}
		rc = look_again(g);
		if (rc)
			return MIN(rc, 0);
	}
	return complain(g);
}

int s3_guarded_put(struct chan *c, const struct put *p, struct s3_req *req, struct s3_resp *resp)
{
	struct guarded g = { .c = c, .self = c->layer->self, .p = p, .req = req, .resp = resp };
	struct range_hold hold;
	int rc;

	rangelock_lock(&g.self->putting, &hold, p->obj->hash, 0, 1, false);
	g.known = s3_etags_get(g.self->etags, p->obj, g.etag);
	if (g.known == S3_UNKNOWN && p->is_new)
		g.known = S3_ABSENT;
	rc = put_on(&g);
	rangelock_unlock(&g.self->putting, &hold);
	return rc;
}
