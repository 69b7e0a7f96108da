/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Another size for a volume and its devices: see resize.h. */
#include "resize.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "child.h"
#include "devices.h"
#include "lock.h"
#include "nbdrs/backend.h"
#include "nbdrs/opt.h"
#include "nl.h"
#include "reattach.h"
#include "usable.h"

enum { SETTLE_MS = 5000 };

/* --- the kernel's part --- */

struct order {
	uint32_t index;
	const char *backend;
	uint64_t size;
};

static int do_resize(const void *arg, void *result)
{
	const struct order *o = arg;
	struct nbdnl *nl = NULL;
	int rc = nbdnl_open(&nl);

	if (!rc)
		rc = nbdnl_resize(nl, o->index, o->backend, o->size);
	nbdnl_close(nl);
	return rc;
}

/*
 * In a child: the driver waits for requests in flight while it holds the lock that everything else needs, so a daemon
 * that dies now would keep us for ever.
 */
static int set_device(const struct device *d, uint64_t size, struct err *err)
{
	const struct order o = { d->index, d->backend, size };
	const struct child_job job = { .fn = do_resize, .arg = &o, .limit_ms = RESIZE_LIMIT_MS };
	_cleanup_free_ struct device *after = malloc(sizeof(*after));
	int rc;

	if (!after)
		return err_set(err, -ENOMEM, "out of memory");
	rc = child_run(&job);
	if (rc == -ETIMEDOUT)
		return err_set(err, rc, "the kernel did not resize /dev/%s within %d s: a request hangs (see dmesg)",
			       d->name, RESIZE_LIMIT_MS / 1000);
	if (rc)
		return err_set(err, rc, "the kernel does not resize /dev/%s: %s", d->name, strerror(-rc));
	rc = device_get(d->index, after);
	if (rc || after->size != o.size)
		return err_set(err, rc ? rc : -EOPNOTSUPP,
			       "/dev/%s does not have its new size: resizing needs Linux 5.3 or later", d->name);
	return 0;
}

/* --- what is there --- */

struct plan {
	struct device *d; /* r->devices_n of them */
	/* Bytes now, 0 = it has no devices: then the daemon sees to all of it. */
	uint64_t volume;
	uint64_t largest; /* of the volume and its devices */
};

static int find_devices(struct resize *r, struct plan *p, struct err *err)
{
	int n = devices_of_export(r->export, r->index, RESIZE_DEVICES_MAX);

	if (n < 0)
		return err_set(err, n, "cannot look for nbd devices: %s", strerror(-n));
	p->d = calloc((size_t)n + 1, sizeof(*p->d));
	if (!p->d)
		return err_set(err, -ENOMEM, "out of memory");
	r->devices_n = (unsigned)n;
	for (unsigned i = 0; i < r->devices_n; i++) {
		int rc = device_get(r->index[i], &p->d[i]);

		if (rc)
			return err_set(err, rc, "cannot look at /dev/nbd%u: %s", r->index[i], strerror(-rc));
	}
	return 0;
}

/* The kernel waits for what it has sent on a dead connection, and everything else then waits for the kernel. */
static int ask_alive(struct ctl_client *c, const struct device *d, struct link *l, struct err *err)
{
	int rc = link_ask(c, d, l, err);

	if (rc == -ENOENT && ctl_was_answered(c))
		return err_set(err, -EBUSY, "/dev/%s was attached to a volume '%s' that is not the one served here, if "
			       "any is; detach it first: nbdrs-attach -d /dev/%s", d->name, d->export, d->name);
	if (!rc && l->alive < l->wanted)
		return err_set(err, -EBUSY, "a connection of /dev/%s to its daemon is dead (%u of %u live); attach it "
			       "again first: nbdrs-attach '%s'", d->name, l->alive, l->wanted, d->export);
	return rc;
}

static int look(struct ctl_client *c, struct resize *r, struct plan *p, struct err *err)
{
	int rc = find_devices(r, p, err);

	for (unsigned i = 0; i < r->devices_n && !rc; i++) {
		struct link l;

		rc = ask_alive(c, &p->d[i], &l, err);
		if (rc)
			break;
		p->volume = l.volume;
		p->largest = MAX(p->largest, MAX(l.volume, p->d[i].size));
	}
	return rc;
}

/* --- the two ways --- */

static int resize_volume(struct ctl_client *c, const struct resize *r, struct err *err)
{
	_cleanup_json_ json_t *reply = NULL;

	return ctl_call(c, json_pack("{s:s, s:s, s:I, s:b}", "cmd", "resize", "export", r->export, "size",
				     (json_int_t)r->size, "shrink", r->may_shrink), &reply, err);
}

static int resize_devices(const struct resize *r, const struct plan *p, struct err *err)
{
	for (unsigned i = 0; i < r->devices_n; i++) {
		const uint64_t size = device_bytes(r->size, p->d[i].block_size);
		int rc = size == p->d[i].size ? 0 : set_device(&p->d[i], size, err);

		if (rc)
			return rc;
	}
	return 0;
}

static int grow(struct ctl_client *c, const struct resize *r, const struct plan *p, struct err *err)
{
	int rc = resize_volume(c, r, err);

	if (rc)
		return rc;
	rc = resize_devices(r, p, err);
	return rc ? err_prefix(err, rc, "the volume has its size, its device not yet (do it again)") : 0;
}

static int shrink(struct ctl_client *c, const struct resize *r, const struct plan *p, struct err *err)
{
	struct err ignored;
	int rc = resize_devices(r, p, err);

	if (!rc)
		rc = resize_volume(c, r, err);
	/* Refused: the devices are what they were. No answer: it may have been done, and they must not reach behind. */
	if (rc && ctl_was_answered(c))
		for (unsigned i = 0; i < r->devices_n; i++)
			if (set_device(&p->d[i], p->d[i].size, &ignored))
				return err_prefix(err, rc, "/dev/%s stays smaller (do it again)", p->d[i].name);
	return rc;
}

static int run_locked(struct ctl_client *c, struct resize *r, struct plan *p, struct err *err)
{
	int rc = look(c, r, p, err);

	if (rc)
		return rc;
	if (r->devices_n && geteuid() != 0)
		return err_set(err, -EPERM, "/dev/%s belongs to it, and resizing a device needs root", p->d[0].name);
	if (r->size < p->largest && r->may_shrink)
		rc = shrink(c, r, p, err);
	else if (r->size < p->largest && r->size == p->volume)
		rc = err_set(err, -EINVAL, "a device of it has %llu bytes: use --shrink",
			     (unsigned long long)p->largest);
	else
		rc = grow(c, r, p, err);
	if (!rc && r->devices_n)
		udev_settle(SETTLE_MS); /* it looks for partitions anew */
	return rc;
}

int resize_run(struct ctl_client *c, struct resize *r, struct err *err)
{
	_cleanup_close_ int lock = -1;
	struct plan p = { 0 };
	int rc = geteuid() == 0 ? lock_take(&lock, err) : 0; /* without root there are no devices to be changed */

	if (!rc)
		rc = run_locked(c, r, &p, err);
	free(p.d);
	return rc;
}

void resize_print(const struct resize *r, bool json)
{
	char text[32];

	if (json) {
		_cleanup_json_ json_t *devices = json_array(), *all = NULL;

		for (unsigned i = 0; devices && i < r->devices_n; i++)
			(void)json_array_append_new(devices, json_sprintf("/dev/nbd%u", r->index[i]));
		all = json_pack("{s:s, s:I, s:O}", "export", r->export, "size", (json_int_t)r->size,
				"devices", devices);
		/* When memory is out anywhere here, nothing is printed. */
		(void)json_dumpf(all, stdout, JSON_INDENT(2));
		(void)puts("");
		return;
	}
	format_size(r->size, text, sizeof(text));
	(void)printf("%s: %s (%llu bytes)\n", r->export, text, (unsigned long long)r->size);
	for (unsigned i = 0; i < r->devices_n; i++)
		(void)printf("/dev/nbd%u: resized\n", r->index[i]);
}
