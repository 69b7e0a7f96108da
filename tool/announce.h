/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * When systemd hears of a device. udev announces a disk as soon as the kernel has connected it; with several
 * connections it may have to be attached anew before all of them work (usable.h), under the feet of who mounts it.
 *
 *	held		files in /run say that it is being attached: 60-nbdrs.rules leaves it as unready as it was
 *	released	they are gone, and an event has it looked at again
 *
 * Files, because udev's rules can see them, and none, which is what there is without us, means ready. One that a tool
 * has left which was killed, or could not get rid of a device that does not work, holds a device that nobody has tried
 * out; attaching the export, or anything to the device, releases it.
 */
#ifndef NBDRS_ANNOUNCE_H
#define NBDRS_ANNOUNCE_H

#include <stdint.h>

/*
 * Before CONNECT. By the device, where it is known (`index` >= 0): a kernel before 6.17 sends its event before it shows
 * the backend. By the export's link in any case. What cannot be held is announced early, which is no error.
 */
void announce_hold(int64_t index, const char *backend);

/* It works, or is gone again; `index` < 0 = there is none. Nothing happens when it was not held. */
void announce_release(int64_t index, const char *backend);

/* An event for a device or partition. Not being allowed to is no error: the kernel's own may do. */
void announce_again(const char *name);

#endif
