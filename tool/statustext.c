/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * nbdrsctl's text. One line for the daemon, then a block per export:
 *
 *	disk0  10GiB  read-write
 *	  chain        raw:file:/srv/disk0.img
 *	  devices      /dev/nbd0 (2 connections)
 *	  connections  3: 2 kernel, 127.0.0.1:4711
 *	  requests        count      bytes   errors       p50       p99     p99.9
 *	    read         120934   472.4MiB        0      12us      80us     300us
 *	  layers       requests      bytes   errors
 *	    raw          120934   472.4MiB        0
 *	      file       120934   472.4MiB        0
 */
#include "statustext.h"

#include <stdio.h>
#include <string.h>

#include "nbdrs/cleanup.h"
#include "nbdrs/opt.h"

enum { LABEL = 12, PEERS_SHOWN = 8 };

static json_int_t number(json_t *j, const char *key)
{
	return json_integer_value(json_object_get(j, key));
}

/* Prints a string of the daemon; what could steer a terminal becomes "?". */
static void put_text(const char *s)
{
	for (; s && *s; s++)
		putchar((unsigned char)*s < 0x20 || *s == 0x7f ? '?' : *s);
}

static void put_label(const char *label)
{
	printf("  %-*s ", LABEL, label);
}

/* "12us", "3.4ms", "1.2s"; "-" for 0, which is "no samples". */
static void format_ns(json_int_t ns, char *out, size_t out_len)
{
	if (ns <= 0)
		(void)snprintf(out, out_len, "-");
	else if (ns < 10000)
		(void)snprintf(out, out_len, "%.1fus", (double)ns / 1e3);
	else if (ns < 1000000)
		(void)snprintf(out, out_len, "%.0fus", (double)ns / 1e3);
	else if (ns < 1000000000)
		(void)snprintf(out, out_len, "%.1fms", (double)ns / 1e6);
	else
		(void)snprintf(out, out_len, "%.1fs", (double)ns / 1e9);
}

static void format_uptime(json_int_t ns, char *out, size_t out_len)
{
	const long long s = ns / 1000000000;

	if (s < 60)
		(void)snprintf(out, out_len, "%llds", s);
	else if (s < 3600)
		(void)snprintf(out, out_len, "%lldm %llds", s / 60, s % 60);
	else if (s < 86400)
		(void)snprintf(out, out_len, "%lldh %lldm", s / 3600, s / 60 % 60);
	else
		(void)snprintf(out, out_len, "%lldd %lldh", s / 86400, s / 3600 % 24);
}

static const char *plural(json_int_t n)
{
	return n == 1 ? "" : "s";
}

/* --- One export --------------------------------------------------------------------------------- */

static void print_devices(json_t *e)
{
	json_t *list = json_object_get(e, "devices"), *d;
	size_t i;

	if (json_array_size(list) == 0)
		return;
	put_label("devices");
	json_array_foreach(list, i, d) {
		const json_int_t n = number(d, "connections"), alive = number(d, "connections_alive");
		const char *name = json_string_value(json_object_get(d, "device"));

		printf("%s", i ? ", " : "");
		put_text(name ? name : "being attached");
		printf(" (%lld connection%s", (long long)n, plural(n));
		if (alive < n)
			printf(", %lld of them dead", (long long)(n - alive));
		printf(")");
	}
	printf("\n");
}

static void print_connections(json_t *e)
{
	json_t *list = json_object_get(e, "clients"), *c;
	const json_int_t n = number(e, "connections");
	json_int_t kernel = 0, in_flight = 0;
	unsigned shown = 0;
	size_t i;

	put_label("connections");
	printf("%lld", (long long)n);
	json_array_foreach(list, i, c) {
		kernel += json_is_true(json_object_get(c, "kernel"));
		in_flight += number(c, "in_flight");
	}
	if (kernel)
		printf(": %lld kernel", (long long)kernel);
	json_array_foreach(list, i, c) {
		if (json_is_true(json_object_get(c, "kernel")))
			continue;
		if (shown == PEERS_SHOWN) {
			printf(", ...");
			break;
		}
		printf("%s", kernel || shown ? ", " : ": ");
		put_text(json_string_value(json_object_get(c, "peer")));
		shown++;
	}
	if (in_flight)
		printf(" (%lld request%s in flight)", (long long)in_flight, plural(in_flight));
	printf("\n");
}

/* A row of the tables: count, bytes, errors. */
static void print_counts(json_int_t count, json_int_t bytes, json_int_t errors)
{
	char text[32];

	format_size((uint64_t)bytes, text, sizeof(text));
	printf("%12lld %10s %8lld", (long long)count, bytes ? text : "-", (long long)errors);
}

static void print_requests(json_t *e)
{
	static const struct {
		const char *label, *key, *latency;
	} rows[] = {
		{ "read", "read", "read" },	 { "write", "write", "write" },
		{ "flush", "flush", "flush" },	 { "trim", "trim", NULL },
		{ "zero", "write_zeroes", NULL }, { "cache", "cache", NULL },
		{ "status", "block_status", NULL },
	};
	json_t *count = json_object_get(e, "requests"), *bytes = json_object_get(e, "bytes");
	json_t *errors = json_object_get(e, "errors"), *latency = json_object_get(e, "latency_ns");
	bool is_first = true;

	for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
		if (!number(count, rows[i].key))
			continue;
		if (is_first)
			printf("  %-*s %12s %10s %8s %9s %9s %9s\n", LABEL, "requests", "count", "bytes",
			       "errors", "p50", "p99", "p99.9");
		is_first = false;
		printf("    %-*s ", LABEL - 2, rows[i].label);
		print_counts(number(count, rows[i].key), number(bytes, rows[i].key),
			     number(errors, rows[i].key));
		if (rows[i].latency) {
			json_t *l = json_object_get(latency, rows[i].latency);
			char p50[16], p99[16], p999[16];

			format_ns(number(l, "p50"), p50, sizeof(p50));
			format_ns(number(l, "p99"), p99, sizeof(p99));
			format_ns(number(l, "p999"), p999, sizeof(p999));
			printf(" %9s %9s %9s", p50, p99, p999);
		}
		printf("\n");
	}
	if (is_first) {
		put_label("requests");
		printf("none yet\n");
	}
}

static json_int_t sum_of(json_t *counters)
{
	const char *key;
	json_int_t sum = 0;
	json_t *v;

	json_object_foreach(counters, key, v)
		sum += json_integer_value(v);
	return sum;
}

/* What a layer says of itself: dirty bytes, requests by status, nodes that are away. */
static void print_state(json_t *state, int depth)
{
	const char *key;
	json_t *v;

	json_object_foreach(state, key, v) {
		printf("  %*s", 4 + 2 * depth, "");
		put_text(key);
		printf(": ");
		put_text(json_string_value(v));
		printf("\n");
	}
}

static void print_layers(json_t *e)
{
	json_t *list = json_object_get(e, "layers"), *l;
	size_t i;

	if (json_array_size(list) == 0)
		return;
	printf("  %-*s %12s %10s %8s\n", LABEL, "layers", "count", "bytes", "errors");
	json_array_foreach(list, i, l) {
		/* Deep trees lose their indent before they lose their columns. */
		const int depth = (int)MIN(number(l, "depth"), 4);
		const char *name = json_string_value(json_object_get(l, "name"));

		printf("  %*s%-*s ", 2 + 2 * depth, "", LABEL - 2 - 2 * depth, name ? name : "?");
		print_counts(sum_of(json_object_get(l, "ops")), sum_of(json_object_get(l, "bytes")),
			     sum_of(json_object_get(l, "errors")));
		printf("\n");
		print_state(json_object_get(l, "state"), depth);
	}
}

static void print_export(json_t *e)
{
	char size[32];

	format_size((uint64_t)number(e, "size"), size, sizeof(size));
	printf("\n");
	put_text(json_string_value(json_object_get(e, "name")));
	printf("  %s  %s\n", size,
	       json_is_true(json_object_get(e, "read_only")) ? "read-only" : "read-write");
	put_label("chain");
	put_text(json_string_value(json_object_get(e, "chain")));
	printf("\n");
	print_devices(e);
	print_connections(e);
	print_requests(e);
	print_layers(e);
}

/* --- The daemon --------------------------------------------------------------------------------- */

static void print_daemon(json_t *j)
{
	const json_int_t threads = number(j, "threads");

	printf("nbdrsd ");
	put_text(json_string_value(json_object_get(j, "version")));
	printf("  pid %lld  ", (long long)number(j, "pid"));
	put_text(json_string_value(json_object_get(j, "engine")));
	printf(", %lld thread%s", (long long)threads, plural(threads));
}

void version_print(json_t *version)
{
	print_daemon(version);
	printf("\n");
}

void status_print(json_t *status)
{
	const json_int_t exports = number(status, "exports_n"), conns = number(status, "connections_n");
	char uptime[32];
	json_t *e;
	size_t i;

	format_uptime(number(status, "uptime_ns"), uptime, sizeof(uptime));
	print_daemon(status);
	printf("  up %s  %lld export%s, %lld connection%s\n", uptime, (long long)exports, plural(exports),
	       (long long)conns, plural(conns));
	json_array_foreach(json_object_get(status, "exports"), i, e)
		print_export(e);
}
