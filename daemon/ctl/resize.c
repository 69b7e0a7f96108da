/* SPDX-License-Identifier: GPL-3.0-or-later */
/* `resize` of the control socket: the volume, and what clients see of it. Kernel devices are the caller's part. */
#include "ctl/ctl_int.h"

#include <errno.h>

#include "nbdrs/export.h"
#include "nbdrs/log.h"

int ctl_cmd_resize(struct ctl_peer *p, json_t *req)
{
	json_t *size = json_object_get(req, "size"), *shrink = json_object_get(req, "shrink");
	struct export *e;
	struct err err = { "" };
	const char *name;
	bool bad;
	int rc;

	name = ctl_get_text(req, "export", &bad);
	if (!name)
		return ctl_refuse(p, -EINVAL, "resize needs \"export\", a string");
	if (!json_is_integer(size) || json_integer_value(size) < 0)
		return ctl_refuse(p, -EINVAL, "resize needs \"size\", a number of bytes");
	if (shrink && !json_is_boolean(shrink))
		return ctl_refuse(p, -EINVAL, "\"shrink\" must be true or false");
	e = export_find(name);
	if (!e)
		return ctl_refuse(p, -ENOENT, "there is no export '%s'; `nbdrsctl status` lists what is served", name);
	rc = export_resize(e, (uint64_t)json_integer_value(size), json_is_true(shrink), &err);
	if (rc)
		return ctl_refuse(p, rc, "%s", err.msg);
	return ctl_answer(p, json_pack("{s:I}", "size", (json_int_t)e->size), NULL, 0);
}
