/* SPDX-License-Identifier: GPL-3.0-or-later */
/* The command line of nbdload. */
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdload.h"

static const char usage_text[] =
	"usage: nbdload (--unix PATH | --tcp HOST:PORT) [--export NAME] [OPTIONS]\n"
	"\n"
	"  --pattern P        randread (default), randwrite, seqread, seqwrite, mixed\n"
	"  --read-percent N   share of reads in 'mixed' (default 50)\n"
	"  --connections N    (default 1)\n"
	"  --threads N        threads that drive them (default: one each)\n"
	"  --depth N          requests in flight per connection (default 1)\n"
	"  --block SIZE       bytes per request, k and M understood (default 4k)\n"
	"  --range SIZE       use only the first SIZE bytes of the export\n"
	"  --seconds S        measured time (default 1)\n"
	"  --warmup S         time before it that is not measured (default 0)\n"
	"  --ops N            stop after N requests instead\n"
	"  --once             random, but no block twice (cold caches)\n"
	"  --seed N           (default 1)\n"
	"  --spin             never block in recv\n"
	"  --cpu N            pin to this CPU\n"
	"  --sndbuf SIZE      SO_SNDBUF of each connection\n"
	"  --verify           write checkable data, check what is read, read it all at the end\n"
	"  --hold             keep the connections until stdin ends\n"
	"  --handshakes       count handshakes for --seconds\n"
	"  --idle N           open N connections, hold them until stdin ends\n"
	"  --max-seconds S    give up opening idle connections after S (default 60)\n"
	"\n"
	"Prints one line of JSON. Exit status: 0, 1 failed (also error replies and mismatches), 2 usage.\n";

__attribute__((noreturn)) static void usage_error(const char *what, const char *value)
{
	fprintf(stderr, "nbdload: %s '%s'; see nbdload --help\n", what, value);
	exit(2);
}

static uint64_t parse_size(const char *option, const char *s, uint64_t min, uint64_t max)
{
	char *end;

	errno = 0;
	uint64_t v = strtoull(s, &end, 10);
	unsigned int shift = 0;

	if (!isdigit((unsigned char)s[0]))
		usage_error(option, s);
	if (*end == 'k' || *end == 'K')
		shift = 10;
	else if (*end == 'M')
		shift = 20;
	else if (*end == 'G')
		shift = 30;
	if (shift)
		end++;
	if (errno || *end || v > max >> shift || v << shift < min)
		usage_error(option, s);
	return v << shift;
}

static double parse_seconds(const char *option, const char *s)
{
	char *end;
	double v = strtod(s, &end);

	if (end == s || *end || !(v >= 0 && v <= 86400))
		usage_error(option, s);
	return v;
}

/* "HOST:PORT" or "[HOST]:PORT", split in place. */
static void parse_tcp(char *s, struct target *t)
{
	char *colon = strrchr(s, ':');

	if (!colon || colon == s || !colon[1])
		usage_error("--tcp wants HOST:PORT, got", s);
	*colon = '\0';
	t->port = colon + 1;
	t->host = s;
	if (s[0] == '[' && colon[-1] == ']') {
		colon[-1] = '\0';
		t->host = s + 1;
	}
}

static void parse_pattern(struct config *cfg)
{
	const char *p = cfg->pattern;
	struct job *job = &cfg->job;

	if (!strcmp(p, "randread") || !strcmp(p, "seqread"))
		job->read_pct = 100;
	else if (!strcmp(p, "randwrite") || !strcmp(p, "seqwrite"))
		job->read_pct = 0;
	else if (strcmp(p, "mixed") != 0)
		usage_error("unknown --pattern", p);
	job->sequential = !strncmp(p, "seq", 3);
}

void parse_args(int argc, char **argv, struct config *cfg)
{
	enum {
		O_UNIX = 1,
		O_TCP,
		O_EXPORT,
		O_PATTERN,
		O_READ,
		O_CONN,
		O_THREADS,
		O_DEPTH,
		O_BLOCK,
		O_RANGE,
		O_SECONDS,
		O_WARMUP,
		O_OPS,
		O_ONCE,
		O_SEED,
		O_SPIN,
		O_CPU,
		O_SNDBUF,
		O_VERIFY,
		O_HOLD,
		O_HAND,
		O_IDLE,
		O_MAX,
		O_HELP
	};
	static const struct option opts[] = {
		{"unix", 1, NULL, O_UNIX},
		{"tcp", 1, NULL, O_TCP},
		{"export", 1, NULL, O_EXPORT},
		{"pattern", 1, NULL, O_PATTERN},
		{"read-percent", 1, NULL, O_READ},
		{"connections", 1, NULL, O_CONN},
		{"threads", 1, NULL, O_THREADS},
		{"depth", 1, NULL, O_DEPTH},
		{"block", 1, NULL, O_BLOCK},
		{"range", 1, NULL, O_RANGE},
		{"seconds", 1, NULL, O_SECONDS},
		{"warmup", 1, NULL, O_WARMUP},
		{"ops", 1, NULL, O_OPS},
		{"once", 0, NULL, O_ONCE},
		{"seed", 1, NULL, O_SEED},
		{"spin", 0, NULL, O_SPIN},
		{"cpu", 1, NULL, O_CPU},
		{"sndbuf", 1, NULL, O_SNDBUF},
		{"verify", 0, NULL, O_VERIFY},
		{"hold", 0, NULL, O_HOLD},
		{"handshakes", 0, NULL, O_HAND},
		{"idle", 1, NULL, O_IDLE},
		{"max-seconds", 1, NULL, O_MAX},
		{"help", 0, NULL, O_HELP},
		{0},
	};
	struct job *job = &cfg->job;
	int c;

	while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
		switch (c) {
		case O_UNIX: job->target.unix_path = optarg; break;
		case O_TCP: parse_tcp(optarg, &job->target); break;
		case O_EXPORT: job->target.export_name = optarg; break;
		case O_PATTERN: cfg->pattern = optarg; break;
		case O_READ:
			job->read_pct = (unsigned int)parse_size("--read-percent", optarg, 0, 100);
			break;
		case O_CONN:
			job->conn_n = (unsigned int)parse_size("--connections", optarg, 1, 4096);
			break;
		case O_THREADS:
			job->thread_n = (unsigned int)parse_size("--threads", optarg, 1, 256);
			break;
		case O_DEPTH:
			job->depth = (unsigned int)parse_size("--depth", optarg, 1, 4096);
			break;
		case O_BLOCK:
			job->block_len = (uint32_t)parse_size("--block", optarg, 512, 32 << 20);
			break;
		case O_RANGE: job->range = parse_size("--range", optarg, 512, INT64_MAX); break;
		case O_SECONDS:
			job->runtime_ns = (uint64_t)(parse_seconds("--seconds", optarg) * 1e9);
			break;
		case O_WARMUP:
			job->warmup_ns = (uint64_t)(parse_seconds("--warmup", optarg) * 1e9);
			break;
		case O_OPS: job->op_limit = parse_size("--ops", optarg, 1, INT64_MAX); break;
		case O_ONCE: job->once = true; break;
		case O_SEED: job->seed = parse_size("--seed", optarg, 0, INT64_MAX); break;
		case O_SPIN: job->spin = true; break;
		case O_CPU: cfg->cpu = (int)parse_size("--cpu", optarg, 0, CPU_SETSIZE - 1); break;
		case O_SNDBUF:
			cfg->sndbuf = (int)parse_size("--sndbuf", optarg, 4096, 1 << 30);
			break;
		case O_VERIFY: cfg->check = true; break;
		case O_HOLD: cfg->hold = true; break;
		case O_HAND: cfg->mode = MODE_HANDSHAKES; break;
		case O_IDLE:
			cfg->mode = MODE_IDLE;
			cfg->idle_n = (unsigned int)parse_size("--idle", optarg, 1, 100000);
			break;
		case O_MAX: cfg->max_seconds = parse_seconds("--max-seconds", optarg); break;
		case O_HELP: fputs(usage_text, stdout); exit(0);
		default: exit(2); /* getopt has said why */
		}
	}
	if (optind < argc)
		usage_error("unexpected argument", argv[optind]);
	if (!job->target.unix_path == !job->target.host)
		usage_error("give exactly one of", "--unix, --tcp");
	if (cfg->check && job->block_len % 8)
		usage_error("--verify wants a --block that is a multiple of", "8");
	if (job->thread_n == 0)
		job->thread_n = job->conn_n;
	if (job->thread_n > job->conn_n)
		usage_error("more --threads than", "--connections");
	parse_pattern(cfg);
}
