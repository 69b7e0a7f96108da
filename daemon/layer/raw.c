/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * raw: the plainest address mapping. The disk is one object of the store below, byte for byte; no header,
 * no shards.
 *
 * Above a mapping an extent has no object (obj_none), below it the store's object. Where the store is one
 * file ("file:/srv/disk.img"), or opens the export's own file in its folder ("file:/srv/": the file layer
 * does that by the export's name), that object has no name either. So there is nothing to translate: every
 * request falls through to kid 0 as it is, lending, mapping, making and removing included, at no cost. The
 * layer exists so that a chain says how its store is laid out.
 *
 * Promises: exactly those of the layer below, for flush, FUA, trim, crash and several writers.
 */
#include "layer/layers.h"

const struct layer_ops raw_layer = {
	.name = "raw",
	.help = "the disk is one object of the store below, byte for byte",
	.min_kids = 1,
	.max_kids = 1,
};
