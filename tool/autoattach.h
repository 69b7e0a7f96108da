/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * attach.conf: which exports become devices at boot, and how. A line is a command line of nbdrs-attach, without the
 * program's name:
 *
 *	disk0  /dev/nbd0
 *	data   --connections 4
 */
#ifndef NBDRS_AUTOATTACH_H
#define NBDRS_AUTOATTACH_H

#include <stddef.h>

#include "conf/conffile.h"
#include "nbdrs/err.h"
#include "options.h"

#define ATTACH_CONF "/etc/nbdrs/attach.conf"

/*
 * Parses one line's words into *o, whose strings point into them; the words' order changes. -EINVAL with
 * "PATH:LINE: ..." for what is no attaching.
 */
int autoattach_parse(const char *path, const struct conf_line *line, struct options *o,
		     struct err *err);

/* Checks every line, also against the others. -EINVAL as above. */
int autoattach_check(const struct conf_file *f, struct err *err);

/*
 * Replaces what *o says of how to attach its export by the export's line, if there is one; o->control stays when it
 * was given. The file was checked.
 */
void autoattach_apply(const struct conf_file *f, struct options *o);

/*
 * The name of the systemd unit that attaches `export`: nbdrs-attach@EXPORT.service, escaped as systemd-escape(1) does.
 * -ENAMETOOLONG when a unit cannot have it (255 bytes).
 */
int autoattach_unit(const char *export, char *out, size_t out_len);

/* --- What nbdrs-attach does: an exit status (say.h), what there is to say was said --- */

/* --autoattach: has systemd start the units of all lines, and does not wait for them. No file, no lines. */
int autoattach_run(const struct options *o);
/* --conf: *o becomes what the file says of its export. */
int autoattach_load(struct options *o, struct conf_file *f);

#endif
