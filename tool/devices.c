/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * nbd devices as the kernel shows them: see devices.h. `pid` in sysfs is that of the tool that attached
 * the device, long gone: only its existence says something. `backend` says whose the device is.
 */
#include "devices.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <jansson.h>

#include "child.h"
#include "mounts.h"
#include "nbdrs/cleanup.h"
#include "nbdrs/opt.h"
#include "nl.h"
#include "options.h"
#include "reattach.h"
#include "sysfs.h"

enum { STATUS_LIMIT_MS = 1000, DAEMON_LIMIT_MS = 1000 };

static int count_one(const char *name, void *arg)
{
	(*(unsigned *)arg)++;
	return 0;
}

int device_get(uint32_t index, struct device *d)
{
	uint64_t sectors, ro = 0;
	int rc;

	memset(d, 0, sizeof(*d));
	d->index = index;
	(void)snprintf(d->name, sizeof(d->name), "nbd%u", index);
	rc = fs_read_u64(&sectors, "/sys/block/%s/size", d->name);
	if (rc)
		return rc == -ENOENT ? -ENODEV : rc;
	rc = fs_read_dev(&d->dev, "/sys/block/%s/dev", d->name);
	if (rc)
		return rc == -ENOENT ? -ENODEV : rc;
	d->size = sectors * 512;
	d->is_connected = sectors != 0 && fs_exists("/sys/block/%s/pid", d->name);
	/* What follows may vanish between two reads; then the device is being detached, and says so above. */
	(void)fs_read_u64(&ro, "/sys/block/%s/ro", d->name);
	d->is_read_only = ro != 0;
	(void)fs_read_u64(&d->block_size, "/sys/block/%s/queue/logical_block_size", d->name);
	(void)fs_each(count_one, &d->queues, "/sys/block/%s/mq", d->name);
	d->has_backend =
		fs_read(d->backend, sizeof(d->backend), "/sys/block/%s/backend", d->name) == 0;
	if (name_from_backend(d->backend, d->export))
		d->export[0] = '\0';
	return 0;
}

struct scan {
	uint32_t *list;
	size_t n, room;
};

static int scan_one(const char *name, void *arg)
{
	struct scan *s = arg;
	uint32_t index;

	if (name_to_index(name, &index))
		return 0;
	if (s->n == s->room) {
		size_t room = s->room ? s->room * 2 : 32;
		uint32_t *list = reallocarray(s->list, room, sizeof(*list));

		if (!list)
			return -ENOMEM;
		s->list = list;
		s->room = room;
	}
	s->list[s->n++] = index;
	return 0;
}

static int by_number(const void *a, const void *b)
{
	const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

bool device_wait_free(uint32_t index, const char *backend, unsigned limit_ms)
{
	_cleanup_free_ struct device *now = malloc(sizeof(*now));
	const uint64_t until = now_ms() + limit_ms;

	if (!now)
		return false;
	for (;;) {
		if (device_get(index, now) || now->size == 0 || strcmp(now->backend, backend) != 0)
			return true;
		if (now_ms() >= until)
			return false;
		sleep_ms(10);
	}
}

int devices_scan(uint32_t **out, size_t *out_n)
{
	struct scan s = { 0 };
	int rc = fs_each(scan_one, &s, "/sys/block");

	if (rc) {
		free(s.list);
		return rc;
	}
	if (s.n)
		qsort(s.list, s.n, sizeof(*s.list), by_number);
	*out = s.list;
	*out_n = s.n;
	return 0;
}

int devices_of_export(const char *export, uint32_t *out, unsigned max)
{
	_cleanup_free_ uint32_t *list = NULL;
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	size_t n = 0;
	int found = 0;
	int rc;

	if (!d)
		return -ENOMEM;
	rc = devices_scan(&list, &n);
	if (rc)
		return rc;
	for (size_t i = 0; i < n && (unsigned)found < max; i++)
		if (!device_get(list[i], d) && d->is_connected && d->export[0] &&
		    strcmp(d->export, export) == 0)
			out[found++] = list[i];
	return found;
}

struct parts_scan {
	struct device_parts *parts;
	const char *disk;
};

static int parts_one(const char *name, void *arg)
{
	struct parts_scan *s = arg;
	struct device_parts *p = s->parts;

	if (strncmp(name, s->disk, strlen(s->disk)) != 0 || !name_is_partition(name) ||
	    p->n == ARRAY_LEN(p->part) || strlen(name) >= sizeof(p->part[0].name))
		return 0;
	if (fs_read_dev(&p->part[p->n].dev, "/sys/block/%s/%s/dev", s->disk, name))
		return 0; /* it went away while we looked */
	memcpy(p->part[p->n].name, name, strlen(name) + 1);
	p->n++;
	return 0;
}

int device_parts(const char *name, struct device_parts *parts)
{
	struct parts_scan s = { .parts = parts, .disk = name };
	int rc = fs_read_dev(&parts->part[0].dev, "/sys/block/%s/dev", name);

	if (rc)
		return rc == -ENOENT ? -ENODEV : rc;
	(void)snprintf(parts->part[0].name, sizeof(parts->part[0].name), "%s", name);
	parts->n = 1;
	return fs_each(parts_one, &s, "/sys/block/%s", name);
}

bool device_parts_has(const struct device_parts *parts, dev_t dev, const char *path)
{
	if (path && strncmp(path, "/dev/", 5) == 0)
		path += 5;
	else
		path = NULL;
	for (unsigned i = 0; i < parts->n; i++)
		if ((dev && parts->part[i].dev == dev) ||
		    (path && strcmp(parts->part[i].name, path) == 0))
			return true;
	return false;
}

int device_by_path(const char *text, uint32_t *index)
{
	char real[PATH_MAX], path[SYSFS_PATH_LEN];

	if (name_to_index(text, index) == 0)
		return 0;
	/* Only what looks like a path: an export may have any other name. */
	if (text[0] == '/' && !fs_path(path, "%s", text) && realpath(path, real)) {
		const char *p = real + strlen(fs_root);

		if (name_to_index(p, index) == 0)
			return 0;
		text = p;
	}
	return name_is_partition(text) ? -EISDIR : -EINVAL;
}

/* --- printing --- */

struct mount_list {
	const struct device_parts *parts;
	json_t *points;
};

/* UTF-8 for JSON and terminals: other bytes, and control characters, as \xNN. */
static json_t *json_text(const char *s)
{
	char out[4 * EXPORT_NAME_LEN];
	size_t n = 0;
	json_t *j = json_string(s);

	if (j)
		return j;
	for (; *s && n + 5 < sizeof(out); s++) {
		if ((unsigned char)*s >= ' ' && (unsigned char)*s < 0x7f)
			out[n++] = *s;
		else
			n += (size_t)snprintf(out + n, 5, "\\x%02x", (unsigned char)*s);
	}
	out[n] = '\0';
	return json_string(out);
}

static int mount_one(char *line, void *arg)
{
	struct mount_list *l = arg;
	struct mount_line m;

	if (!mount_parse(line, &m) && device_parts_has(l->parts, m.dev, m.source))
		(void)json_array_append_new(l->points, json_text(m.point));
	return 0;
}

/*
 * One daemon that hangs must not cost a second for each device: after the first time it is not asked
 * again (*is_away).
 */
static const char *state_name(const struct device *d, const char *control, bool *is_away, struct link *l)
{
	struct err err;
	enum link_state state = d->export[0] ? LINK_WAITING : LINK_FOREIGN;

	l->wanted = d->queues;
	if (!*is_away || !d->export[0])
		state = reattach_look(control, d, DAEMON_LIMIT_MS, l, &err);
	*is_away |= state == LINK_WAITING;
	return link_state_names[state];
}

static json_t *device_json(const struct device *d, const char *state, unsigned connections)
{
	_cleanup_free_ struct device_parts *parts = malloc(sizeof(*parts));
	struct mount_list l = { .parts = parts, .points = json_array() };
	json_t *names = json_array();
	char node[DEVICE_NAME_LEN + 8];

	if (!parts || device_parts(d->name, parts)) {
		json_decref(names);
		json_decref(l.points);
		return NULL;
	}
	(void)fs_each_line(mount_one, &l, "/proc/self/mountinfo"); /* no /proc: no mounts to show */
	for (unsigned i = 1; i < parts->n; i++)
		(void)json_array_append_new(names, json_sprintf("/dev/%s", parts->part[i].name));
	(void)snprintf(node, sizeof(node), "/dev/%s", d->name);
	return json_pack("{s:s, s:s, s:I, s:o, s:o, s:I, s:I, s:b, s:I, s:o, s:o}", "device", node,
			 "state", state, "index", (json_int_t)d->index, "export",
			 d->export[0] ? json_text(d->export) : json_null(), "backend",
			 d->backend[0] ? json_text(d->backend) : json_null(), "size",
			 (json_int_t)d->size, "block_size", (json_int_t)d->block_size, "read_only",
			 d->is_read_only, "connections", (json_int_t)connections, "mounts",
			 l.points, "partitions", names);
}

/* A string for a cell of the table: printable, "-" for nothing. */
static void print_cell(const char *s, int width)
{
	char cell[256];
	size_t n = 0;

	for (; s && *s && n + 5 < sizeof(cell); s++) {
		if ((unsigned char)*s > ' ' && *s != 0x7f)
			cell[n++] = *s;
		else
			n += (size_t)snprintf(cell + n, 5, "\\x%02x", (unsigned char)*s);
	}
	if (n == 0)
		cell[n++] = '-';
	cell[n] = '\0';
	(void)printf("%-*s", width, cell);
}

static void print_row(const json_t *d)
{
	json_t *mounts = json_object_get(d, "mounts");
	const char *export = json_string_value(json_object_get(d, "export"));
	char size[32];
	size_t i;
	json_t *point;

	format_size((uint64_t)json_integer_value(json_object_get(d, "size")), size, sizeof(size));
	print_cell(json_string_value(json_object_get(d, "device")), 14);
	print_cell(export, 20);
	(void)printf(" %10s  %2" JSON_INTEGER_FORMAT "  %-4s  %-8s", size,
		     json_integer_value(json_object_get(d, "connections")),
		     json_is_true(json_object_get(d, "read_only")) ? "ro" : "rw",
		     json_string_value(json_object_get(d, "state")));
	json_array_foreach(mounts, i, point) {
		(void)printf(" ");
		print_cell(json_string_value(point), 0);
	}
	(void)printf("\n");
}

struct status {
	unsigned n;
	struct nbdnl_device
		devices[(CHILD_RESULT_MAX - sizeof(unsigned)) / sizeof(struct nbdnl_device)];
};

static int ask_status(const void *arg, void *result)
{
	struct status *s = result;
	struct nbdnl *nl = NULL;
	int rc = nbdnl_open(&nl);

	if (!rc)
		rc = nbdnl_status(nl, NL_INDEX_ANY, s->devices, ARRAY_LEN(s->devices), &s->n);
	nbdnl_close(nl);
	return rc;
}

/* False only when the driver itself says that nothing is connected: then sysfs shows the past. */
static bool is_in_use(const struct status *s, uint32_t index)
{
	for (unsigned i = 0; i < s->n; i++)
		if (s->devices[i].index == index)
			return s->devices[i].is_in_use;
	return true;
}

/* The connected ones of list[n] as a JSON array; NULL without memory. */
static json_t *collect(const uint32_t *list, size_t n, const char *control)
{
	struct status status = { 0 };
	_cleanup_free_ struct device *d = malloc(sizeof(*d));
	json_t *array = json_array();
	bool is_away = false;
	const struct child_job job = { .fn = ask_status,
				       .result = &status,
				       .result_len = sizeof(status),
				       .limit_ms = STATUS_LIMIT_MS };

	if (!d || !array) {
		json_decref(array);
		return NULL;
	}
	if (n && child_run(&job))
		status.n = 0; /* the driver is stuck, or too old: sysfs must do */
	for (size_t i = 0; i < n; i++) {
		const char *state;
		struct link l;
		json_t *j;

		if (device_get(list[i], d) || !d->is_connected || !is_in_use(&status, list[i]))
			continue;
		state = state_name(d, control, &is_away, &l);
		j = device_json(d, state, l.wanted);
		if (j)
			(void)json_array_append_new(array, j);
	}
	return array;
}

int devices_print(const uint32_t *only, const struct options *o)
{
	_cleanup_free_ uint32_t *list = NULL;
	size_t n = 0, i;
	json_t *array, *d;
	int rc = only ? 0 : devices_scan(&list, &n);

	if (rc)
		return rc;
	array = only ? collect(only, 1, o->control) : collect(list, n, o->control);
	if (!array)
		return -ENOMEM;
	if (o->json) {
		json_t *top = json_pack("{s:o}", "devices", array);

		(void)json_dumpf(top, stdout, JSON_INDENT(2));
		(void)printf("\n");
		json_decref(top);
		return ferror(stdout) ? -EIO : 0;
	}
	if (!only && json_array_size(array))
		(void)printf("%-14s%-20s %10s  %2s  %-4s  %-8s %s\n", "DEVICE", "EXPORT", "SIZE", "C",
			     "MODE", "STATE", "MOUNTED");
	json_array_foreach(array, i, d)
		print_row(d);
	json_decref(array);
	return ferror(stdout) ? -EIO : 0;
}
