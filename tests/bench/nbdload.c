/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * nbdload: the three modes, and the JSON line on stdout.
 *
 *   load        requests over N connections; throughput and latencies; optional data check
 *   handshakes  connect, NBD_OPT_GO, NBD_CMD_DISC, close, one after the other
 *   idle        open N connections and hold them
 *
 * With --hold (implied by idle) the connections stay open after the line was printed, until stdin
 * ends: a server that has a process per connection can be looked at before it is gone.
 */
#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbdload.h"

static double cpu_seconds(void)
{
	struct rusage u;

	(void)getrusage(RUSAGE_SELF, &u); /* cannot fail with these arguments */
	return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
	       (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

/* One line, written in one piece: the reader at the other end of the pipe waits for it. */
static void finish_line(void)
{
	putchar('\n');
	if (fflush(stdout) == EOF) {
		perror("nbdload: stdout");
		exit(1);
	}
}

static void wait_stdin(void)
{
	char scrap[64];

	while (read(STDIN_FILENO, scrap, sizeof(scrap)) > 0)
		;
}

static int open_all(const struct config *cfg, int *fds, unsigned int n, struct export_info *info)
{
	char why[512];

	for (unsigned int i = 0; i < n; i++) {
		fds[i] = conn_open(&cfg->job.target, info, why, sizeof(why));
		if (fds[i] < 0) {
			fprintf(stderr, "nbdload: connection %u: %s: %s\n", i + 1, why,
				strerror(-fds[i]));
			return fds[i];
		}
		if (cfg->sndbuf && setsockopt(fds[i], SOL_SOCKET, SO_SNDBUF, &cfg->sndbuf,
					      sizeof(cfg->sndbuf)) < 0) {
			int err = -errno;

			fprintf(stderr, "nbdload: SO_SNDBUF: %s\n", strerror(-err));
			return err;
		}
	}
	return 0;
}

static void print_latency(const struct hist *h)
{
	printf("\"latency_us\":{\"mean\":%.1f,\"p50\":%.1f,\"p99\":%.1f,\"p999\":%.1f,\"max\":%.1f}",
	       h->count ? (double)h->sum / (double)h->count / 1e3 : 0,
	       (double)hist_quantile(h, 0.5) / 1e3, (double)hist_quantile(h, 0.99) / 1e3,
	       (double)hist_quantile(h, 0.999) / 1e3, (double)h->max / 1e3);
}

static void print_load(const struct config *cfg, const struct result *r)
{
	const struct job *job = &cfg->job;
	double rate = r->seconds > 0 ? (double)r->ops / r->seconds : 0;

	printf("{\"mode\":\"load\",\"pattern\":\"%s\",\"block\":%" PRIu32 ",\"depth\":%u,"
	       "\"connections\":%u,\"threads\":%u,\"range\":%" PRIu64 ",\"seconds\":%.6f,"
	       "\"ops\":%" PRIu64 ",\"ops_all\":%" PRIu64 ",\"ops_per_s\":%.1f,\"mb_per_s\":%.2f,"
	       "\"errors\":%" PRIu64 ",\"first_error\":%" PRIu32 ",",
	       cfg->pattern, job->block_len, job->depth, job->conn_n, job->thread_n, job->range,
	       r->seconds, r->ops, r->ops_all, rate, rate * job->block_len / 1e6, r->errors,
	       r->first_error);
	print_latency(&r->hist);
	if (job->verify)
		printf(",\"verify\":{\"checked\":%" PRIuFAST64 ",\"mismatches\":%" PRIuFAST64 "}",
		       atomic_load(&job->verify->checked), atomic_load(&job->verify->mismatches));
	printf(",\"client_cpu_s\":%.4f}", cpu_seconds());
	finish_line();
}

/* At the end of a verify run: read every block that was written, over all connections. */
static int sweep(const struct job *job, const int *fds, struct result *r)
{
	struct job s = *job;
	struct result *sr = calloc(1, sizeof(*sr));
	int err = -ENOMEM;

	s.sweep = true;
	s.sequential = true;
	s.once = false;
	s.read_pct = 100;
	if (sr)
		err = run_job(&s, fds, sr);
	if (!err) {
		r->errors += sr->errors;
		r->first_error = r->first_error ? r->first_error : sr->first_error;
	}
	free(sr);
	return err;
}

/* Check what was asked for against what the export has; fills job->range. */
static int fit_range(struct job *job, uint64_t size)
{
	if (job->range > size) {
		fprintf(stderr,
			"nbdload: --range %" PRIu64 " exceeds the export's %" PRIu64 " bytes\n",
			job->range, size);
		return -EINVAL;
	}
	if (job->range == 0)
		job->range = size;
	if (job->range / job->block_len < job->conn_n) {
		fprintf(stderr,
			"nbdload: %" PRIu64 " bytes hold less than one block per connection\n",
			job->range);
		return -EINVAL;
	}
	return 0;
}

/* The load over open connections, from the table of blocks to the JSON line. */
static int load_and_print(const struct config *cfg, struct job *job, const int *fds,
			  struct result *r)
{
	struct verify v = {0};
	int err = 0;

	if (cfg->check) {
		err = verify_init(&v, job->range / job->block_len, job->block_len, job->seed);
		if (err) {
			fprintf(stderr, "nbdload: out of memory for the table of blocks\n");
			return err;
		}
		job->verify = &v;
	}
	err = run_job(job, fds, r);
	if (!err && job->verify)
		err = sweep(job, fds, r);
	if (!err) {
		print_load(cfg, r);
		if (r->errors > 0 || atomic_load(&v.mismatches) > 0)
			err = -EIO;
	}
	job->verify = NULL;
	verify_free(&v);
	return err;
}

static int run_load(struct config *cfg)
{
	struct job *job = &cfg->job;
	struct result *r = calloc(1, sizeof(*r));
	int *fds = calloc(job->conn_n, sizeof(*fds));
	struct export_info info = {0};
	int err = -ENOMEM;

	if (!r || !fds) {
		fprintf(stderr, "nbdload: out of memory\n");
		goto out;
	}
	err = open_all(cfg, fds, job->conn_n, &info);
	if (err)
		goto out;
	err = fit_range(job, info.size);
	if (!err)
		err = load_and_print(cfg, job, fds, r);
	if (!err && cfg->hold)
		wait_stdin();
	for (unsigned int i = 0; i < job->conn_n; i++)
		conn_close(fds[i]);
out:
	free(fds);
	free(r);
	return err ? 1 : 0;
}

static int run_handshakes(struct config *cfg)
{
	static struct hist h; /* too large for the stack */
	struct export_info info = {0};
	uint64_t t0 = now_ns();
	uint64_t t = t0;
	int fd;

	do {
		if (open_all(cfg, &fd, 1, &info) < 0)
			return 1;
		conn_close(fd);

		uint64_t end = now_ns();

		hist_add(&h, end - t);
		t = end;
	} while (t - t0 < cfg->job.runtime_ns);

	double seconds = (double)(t - t0) / 1e9;

	printf("{\"mode\":\"handshakes\",\"ops\":%" PRIu64 ",\"ops_all\":%" PRIu64
	       ",\"seconds\":%.6f,\"ops_per_s\":%.1f,\"errors\":0,",
	       h.count, h.count, seconds, (double)h.count / seconds);
	print_latency(&h);
	printf(",\"client_cpu_s\":%.4f}", cpu_seconds());
	finish_line();
	if (cfg->hold)
		wait_stdin();
	return 0;
}

static int run_idle(struct config *cfg)
{
	int *fds = calloc(cfg->idle_n, sizeof(*fds));
	struct export_info info = {0};
	uint64_t t0 = now_ns();
	uint64_t slowest = 0;
	unsigned int n = 0;
	int err = 0;

	if (!fds) {
		fprintf(stderr, "nbdload: out of memory\n");
		return 1;
	}
	while (n < cfg->idle_n && (double)(now_ns() - t0) / 1e9 < cfg->max_seconds) {
		uint64_t t = now_ns();

		err = open_all(cfg, &fds[n], 1, &info);
		if (err) {
			fprintf(stderr, "nbdload: %u connections were open\n", n);
			goto out;
		}
		if (now_ns() - t > slowest)
			slowest = now_ns() - t;
		n++;
	}
	printf("{\"mode\":\"idle\",\"wanted\":%u,\"opened\":%u,\"seconds\":%.6f,"
	       "\"slowest_ms\":%.2f,\"client_cpu_s\":%.4f}",
	       cfg->idle_n, n, (double)(now_ns() - t0) / 1e9, (double)slowest / 1e6, cpu_seconds());
	finish_line();
	wait_stdin();
out:
	for (unsigned int i = 0; i < n; i++)
		conn_close(fds[i]);
	free(fds);
	return err ? 1 : 0;
}

int main(int argc, char **argv)
{
	struct config cfg = {
		.pattern = "randread",
		.max_seconds = 60,
		.cpu = -1,
		.job =
			{
				.target.export_name = "",
				.conn_n = 1,
				.thread_n = 0,
				.depth = 1,
				.block_len = 4096,
				.read_pct = 50,
				.runtime_ns = 1000000000,
				.seed = 1,
			},
	};
	struct rlimit files;

	parse_args(argc, argv, &cfg);
	if (cfg.cpu >= 0) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET((unsigned int)cfg.cpu, &set);
		if (sched_setaffinity(0, sizeof(set), &set) < 0) {
			fprintf(stderr, "nbdload: cannot pin to CPU %d: %s\n", cfg.cpu,
				strerror(errno));
			return 1;
		}
	}
	/* Thousands of idle connections want more than the default soft limit of 1024. */
	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &files); /* if refused, opening says so */
	}
	switch (cfg.mode) {
	case MODE_HANDSHAKES: return run_handshakes(&cfg);
	case MODE_IDLE: return run_idle(&cfg);
	default: return run_load(&cfg);
	}
}
