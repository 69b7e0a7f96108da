/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What layer s3 does with many objects at once: listings in pages, deletions in batches.
 *
 * A listing names each page's successor, so its pages can't be asked for at the same time, and each
 * is insisted on. Only names without "/" are objects of this store; other "folders" below the
 * prefix are not even looked into (delimiter).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer/s3/s3_guard.h"
#include "layer/s3/s3_int.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/io.h"
#include "nbdrs/log.h"

enum {
	PARSE_INLINE_LEN = 8 * 1024, /* of XML; expat does ~100 MB/s */
	PARALLEL_BATCHES = 4,
	PARALLEL_SINGLES = 16,
	TOKEN_MAX = 4096,
};

/* ---- listings ---- */

struct entry {
	uint64_t size;
	unsigned name; /* offset into names */
};

/* A page: parsed on a thread of the pool, handed out here. */
struct page_job {
	struct s3_self *self;
	unsigned listed; /* objects so far, of all pages */
	const char *text, *prefix;
	size_t text_len, prefix_len;
	struct s3_page page;
	struct entry *entries;
	char *names;
	size_t n, room, names_len, names_room;
};

static int collect(void *arg, const char *key, uint64_t size, const char *etag)
{
	struct page_job *job = arg;
	size_t len = strlen(key);
	struct obj obj;

	if (len <= job->prefix_len || memcmp(key, job->prefix, job->prefix_len) != 0 ||
	    obj_set(&obj, key + job->prefix_len) != 0)
		return 0; /* none of ours */
	if (job->n == job->room) {
		size_t room = MAX(2 * job->room, 64U);
		struct entry *entries = realloc(job->entries, room * sizeof(*entries));

		if (!entries)
			return -ENOMEM;
		job->entries = entries;
		job->room = room;
	}
	if (job->names_len + obj.len + 1 > job->names_room) {
		size_t room = MAX(2 * job->names_room, 4096U);
		char *names = realloc(job->names, room);

		if (!names)
			return -ENOMEM;
		job->names = names;
		job->names_room = room;
	}
	s3_guard_listed(job->self, &obj, etag, job->listed++);
	job->entries[job->n++] = (struct entry){ size, (unsigned)job->names_len };
	memcpy(job->names + job->names_len, obj.name, obj.len + 1U);
	job->names_len += obj.len + 1U;
	return 0;
}

static int parse_page(void *arg)
{
	struct page_job *job = arg;

	return s3_xml_list(job->text, job->text_len, &job->page, collect, job);
}

/* Parameters in the order of their names, as signatures want them. */
static int page_query(char *out, size_t room, const char *token, const char *prefix)
{
	int at = 0;

	if (token && strlen(token) > TOKEN_MAX)
		return -EPROTO;
	if (token) {
		at = snprintf(out, room, "continuation-token=");
		at += (int)s3_encode(token, strlen(token), false, out + at);
		out[at++] = '&';
	}
	at += snprintf(out + at, room - (size_t)at,
		       "delimiter=%%2F&encoding-type=url&list-type=2&max-keys=1000&prefix=");
	(void)s3_encode(prefix, strlen(prefix), false, out + at);
	return 0;
}

/* Asks for a page and takes it apart. */
static CO_FN int get_page(struct chan *c, const char *query, struct page_job *job)
{
	const struct s3_self *self = c->layer->self;
	struct s3_resp *resp = s3_resp_new();
	const struct s3_req req = { .method = "GET", .key = "", .query = query };
	int rc;

	if (!resp)
		return -ENOMEM;
	rc = s3_insist(self->s3, &req, resp, &c->not_before);
	if (rc == 0) {
		job->text = resp->http.text ? resp->http.text : "";
		job->text_len = resp->http.text_len;
		rc = job->text_len <= PARSE_INLINE_LEN ? parse_page(job) : offload(parse_page, job);
		job->text = NULL;
	}
	s3_resp_free(resp);
	return rc;
}

static int hand_out(const struct page_job *job, list_fn *fn, void *arg)
{
	for (size_t i = 0; i < job->n; i++) {
		int rc = fn(arg, job->names + job->entries[i].name, job->entries[i].size);

		if (rc)
			return rc;
	}
	return 0;
}

/* All pages; `job` has room that is used for each of them. */
static CO_FN int list_pages(struct chan *c, const char *full, char *query, size_t room,
			    struct page_job *job, list_fn *fn, void *arg)
{
	_cleanup_free_ char *token = NULL;

	for (;;) {
		int rc = page_query(query, room, token, full);

		job->n = job->names_len = 0;
		if (!rc)
			rc = get_page(c, query, job);
		if (!rc)
			rc = hand_out(job, fn, arg);
		/* The same token again would go on for ever. */
		if (!rc && job->page.is_truncated && token && strcmp(token, job->page.token) == 0)
			rc = -EPROTO;
		free(token);
		token = TAKE_PTR(job->page.token);
		if (rc || !job->page.is_truncated)
			return rc;
	}
}

int s3_store_list(struct chan *c, const char *prefix, list_fn *fn, void *arg)
{
	struct s3_self *self = c->layer->self;
	struct page_job job = {
		.self = self, .prefix = self->prefix, .prefix_len = strlen(self->prefix)
	};
	_cleanup_free_ char *query = NULL, *full = NULL;
	size_t room;
	int rc;

	if (strlen(prefix) > OBJ_NAME_MAX)
		return -ENAMETOOLONG;
	if (asprintf(&full, "%s%s", self->prefix, prefix) < 0) {
		full = NULL;
		return -ENOMEM;
	}
	room = 3 * (strlen(full) + TOKEN_MAX) +
	       160; /* the parameters' names are fewer bytes than that */
	query = malloc(room);
	if (!query)
		return -ENOMEM;
	rc = list_pages(c, full, query, room, &job, fn, arg);
	free(job.entries);
	free(job.names);
	return rc;
}

/* ---- deletions ---- */

struct del_run {
	struct chan *c;
	const struct obj *objs;
	unsigned n, next, step;
	bool insists; /* too many to begin anew because of one */
	CO_FN int (*some)(struct del_run *r, const struct obj *objs, unsigned n);
	int rc; /* the first failure; nothing new is begun after it */
};

static CO_FN void del_worker(void *arg)
{
	struct del_run *r = arg;

	while (r->next < r->n && !r->rc) {
		unsigned at = r->next, n = MIN(r->step, r->n - at);
		int rc;

		r->next += n;
		rc = r->some(r, r->objs + at, n);
		if (rc && !r->rc)
			r->rc = rc;
	}
}

static CO_FN int del_all(struct del_run *r, unsigned workers)
{
	struct co_group group = CO_GROUP_INIT;

	for (unsigned i = 1; i < workers && i * r->step < r->n; i++)
		co_group_spawn(&group, del_worker, r);
	del_worker(r);
	co_group_wait(&group);
	return r->rc;
}

static CO_FN int deliver(struct del_run *r, const struct s3_req *req, struct s3_resp *resp)
{
	const struct s3_self *self = r->c->layer->self;

	return r->insists ? s3_insist(self->s3, req, resp, &r->c->not_before)
			  : s3_do(self->s3, req, resp, &r->c->not_before);
}

static CO_FN int del_one(struct del_run *r, const struct obj *objs, unsigned n)
{
	const struct s3_self *self = r->c->layer->self;
	struct s3_resp *resp = s3_resp_new();
	char key[S3_KEY_MAX + 1];
	const struct s3_req req = { .method = "DELETE", .key = key };
	int rc;

	if (!resp)
		return -ENOMEM;
	(void)snprintf(key, sizeof(key), "%s%s", self->prefix, objs->name);
	rc = deliver(r, &req, resp);
	s3_resp_free(resp);
	return rc == -ENOENT ? 0 : rc;
}

/* The body of a batch and its hash: some 100 us of work for a full one. */
struct body_job {
	const char *prefix;
	const struct obj *objs;
	unsigned n;
	char *text;
	size_t len;
	char md5[32];
};

static int make_body(void *arg)
{
	struct body_job *job = arg;
	int rc = s3_xml_delete(job->prefix, job->objs, job->n, &job->text, &job->len);

	return rc ? rc : s3_md5(job->text, job->len, job->md5);
}

struct verdict {
	const struct s3_self *self;
	int rc;
};

static void undeleted(void *arg, const char *key, const char *code, const char *message)
{
	static struct log_gate gate;
	struct verdict *v = arg;
	unsigned suppressed;
	int rc;

	if (strcmp(code, "NoSuchKey") == 0)
		return;
	rc = s3_code_error(code);
	if (!rc)
		rc = strcmp(code, "AccessDenied") == 0 ? -EACCES : -EIO;
	/* A permanent one counts: repeating can't help. */
	if (!v->rc || (is_transient(v->rc) && !is_transient(rc)))
		v->rc = rc;
	if (log_gate_open(&gate, &suppressed))
		log_warn(
			"s3 object was not deleted endpoint=%s object=%s code=%s reason=\"%s\" suppressed=%u",
			s3_endpoint(v->self->s3), key, code, message, suppressed);
}

/* One multi-delete. -ENOTSUP, -EINVAL, -ENOENT: this server has it not, or not for these names. */
static CO_FN int del_multi(struct del_run *r, const struct obj *objs, unsigned n)
{
	const struct s3_self *self = r->c->layer->self;
	struct body_job job = { .prefix = self->prefix, .objs = objs, .n = n };
	struct s3_resp *resp = s3_resp_new();
	struct verdict verdict = { .self = self };
	struct iovec v;
	struct iov body;
	struct s3_req req = {
		.method = "POST", .key = "", .query = "delete=", .body = &body, .md5 = job.md5
	};
	int rc = resp ? offload(make_body, &job) : -ENOMEM;

	if (rc == 0) {
		body = iov_one(&v, job.text, job.len);
		rc = deliver(r, &req, resp);
	}
	if (rc == 0)
		rc = s3_xml_deleted(resp->http.text, resp->http.text_len, undeleted, &verdict);
	free(job.text);
	s3_resp_free(resp);
	return rc ? rc : verdict.rc;
}

static CO_FN int del_singly(struct del_run *r, const struct obj *objs, unsigned n)
{
	struct del_run singles = {
		.c = r->c,
		.objs = objs,
		.n = n,
		.step = 1,
		.insists = r->insists,
		.some = del_one,
	};

	return del_all(&singles, PARALLEL_SINGLES);
}

/* As many as are deleted with one request, where that can be. */
static CO_FN int del_some(struct del_run *r, const struct obj *objs, unsigned n)
{
	struct s3_self *self = r->c->layer->self;
	int rc = -ENOTSUP;

	if (n == 1)
		return del_one(r, objs, n);
	if (!atomic_load_explicit(&self->has_no_multi_del, memory_order_relaxed))
		rc = del_multi(r, objs, n);
	if (rc == -ENOTSUP || rc == -ENOENT)
		atomic_store_explicit(&self->has_no_multi_del, true, memory_order_relaxed);
	return rc == -ENOTSUP || rc == -ENOENT || rc == -EINVAL ? del_singly(r, objs, n) : rc;
}

static CO_FN int del_batch(struct del_run *r, const struct obj *objs, unsigned n)
{
	int rc = del_some(r, objs, n);

	s3_guard_del_was(r->c->layer->self, objs, n, rc);
	return rc;
}

int s3_store_del(struct chan *c, const struct obj *objs, unsigned n)
{
	struct del_run r = {
		.c = c,
		.objs = objs,
		.n = n,
		.step = S3_DELETE_MAX,
		.insists = n > S3_DELETE_MAX,
		.some = del_batch,
	};

	return n > 0 ? del_all(&r, PARALLEL_BATCHES) : 0;
}
