/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * nbdload: a load generator for NBD servers that is not itself the limit.
 *
 * Used by bench.py only; it shares no code with the daemon, so that a mistake in the one cannot
 * hide in the other. Names and numbers are those of the NBD project's doc/proto.md.
 */
#ifndef NBDLOAD_H
#define NBDLOAD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* ---- nbdload-hist.c: latency histogram ---- */

/*
 * Log-linear ("HDR") buckets: values below 2^HIST_SUB_BITS have a bucket each, every power of two
 * above has 2^HIST_SUB_BITS of them, so that a reported value is at most 1.6 % off.
 */
#define HIST_SUB_BITS 6
#define HIST_BUCKETS  ((64 - HIST_SUB_BITS + 1) << HIST_SUB_BITS)

struct hist {
	uint64_t count;
	uint64_t sum; /* ns */
	uint64_t max; /* ns */
	uint64_t bucket[HIST_BUCKETS];
};

/** Count one latency of @ns nanoseconds. */
void hist_add(struct hist *h, uint64_t ns);

/** Add all of @from to @into. */
void hist_merge(struct hist *into, const struct hist *from);

/** The latency in ns that @fraction (0..1) of the values do not exceed; 0 when @h is empty. */
uint64_t hist_quantile(const struct hist *h, double fraction);

/* ---- nbdload-conn.c: connecting and the handshake ---- */

/** Where the server listens: either @unix_path, or @host and @port; and which export to ask for. */
struct target {
	const char *unix_path; /* NULL = TCP */
	const char *host;
	const char *port;
	const char *export_name;
};

/** What the server said in NBD_INFO_EXPORT. */
struct export_info {
	uint64_t size;  /* bytes */
	uint16_t flags; /* transmission flags */
};

/**
 * Connect to @t, do the fixed newstyle handshake and NBD_OPT_GO.
 *
 * Returns the connected, blocking socket (owned by the caller; TCP_NODELAY set) and fills @info,
 * or -errno with @why naming the step that failed (@why_len bytes).
 */
int conn_open(const struct target *t, struct export_info *info, char *why, size_t why_len);

/** Send NBD_CMD_DISC (best effort: the peer may be gone) and close @fd. */
void conn_close(int fd);

/* ---- nbdload-verify.c: data that can be checked ---- */

/**
 * What each block was last written with, shared by all connections.
 *
 * A block's word is generation << 1 | busy. Generation 0 = not written by this run, its content is
 * not checked. A request claims its block (busy) for as long as it is in flight, so that no two
 * requests in flight overlap and every read has exactly one right answer.
 */
struct verify {
	_Atomic uint32_t *word; /* one per block */
	uint64_t block_n;
	uint32_t block_len; /* bytes, a multiple of 8 */
	uint64_t seed;
	atomic_uint_fast64_t checked; /* blocks read and compared */
	atomic_uint_fast64_t mismatches;
};

/** Set up @v for @block_n blocks of @block_len bytes; @seed changes all data. -ENOMEM. */
int verify_init(struct verify *v, uint64_t block_n, uint32_t block_len, uint64_t seed);
void verify_free(struct verify *v);

/** Claim @block; false when another request in flight has it. Fills @gen with its generation. */
bool verify_claim(struct verify *v, uint64_t block, uint32_t *gen);

/** Release @block, which now holds generation @gen. */
void verify_release(struct verify *v, uint64_t block, uint32_t gen);

/** Fill @buf (block_len bytes) with what generation @gen of @block looks like. */
void verify_fill(const struct verify *v, void *buf, uint64_t block, uint32_t gen);

/** Compare @buf with generation @gen of @block; counts, and prints the first mismatches. */
void verify_check(struct verify *v, const void *buf, uint64_t block, uint32_t gen);

/* ---- nbdload-run.c: the load itself ---- */

/** What to do; filled from the command line, read-only once the threads run. */
struct job {
	struct target target;
	unsigned int conn_n;
	unsigned int thread_n; /* each drives conn_n / thread_n connections */
	unsigned int depth;    /* requests in flight per connection */
	uint32_t block_len;    /* bytes per request */
	unsigned int read_pct; /* 100 = reads only */
	bool sequential;
	bool once;      /* random, but no block twice (cold caches) */
	uint64_t range; /* bytes of the export to use */
	uint64_t runtime_ns;
	uint64_t warmup_ns;
	uint64_t op_limit; /* 0 = until runtime_ns is over */
	uint64_t seed;
	bool spin;             /* never block in recv */
	struct verify *verify; /* NULL = do not check data */
	bool sweep;            /* read each written block once, in order (end of a verify run) */
};

struct result {
	uint64_t ops;         /* completed in the measured window */
	uint64_t ops_all;     /* completed at all: with warm-up and drain */
	uint64_t errors;      /* error replies */
	uint32_t first_error; /* NBD errno of the first of them */
	double seconds;       /* the measured window */
	struct hist hist;     /* of the measured window */
};

/**
 * Run @job over the already connected sockets @fds (job->conn_n of them, borrowed) and fill @res.
 *
 * Returns 0 when the load ran to its end (error replies are counted, not fatal), or -errno when a
 * connection broke, stalled or spoke nonsense; the reason is printed to stderr.
 */
int run_job(const struct job *job, const int *fds, struct result *res);

/** CLOCK_MONOTONIC in nanoseconds. */
uint64_t now_ns(void);

/* ---- nbdload-args.c: the command line ---- */

enum mode { MODE_LOAD, MODE_HANDSHAKES, MODE_IDLE };

struct config {
	enum mode mode;
	struct job job;
	const char *pattern; /* randread, ... */
	unsigned int idle_n;
	double max_seconds; /* idle: stop opening after that long */
	int cpu;            /* -1 = any */
	int sndbuf;         /* 0 = leave the default */
	bool check;
	bool hold;
};

/** Fill @cfg, which holds the defaults; does not return when @argv is wrong or asks for --help. */
void parse_args(int argc, char **argv, struct config *cfg);

#endif
