/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The list of layers. A new layer is a file, a line here and one in layers.h, and a section in
 * docs/layers.md (a unit test looks for it).
 */
#include <string.h>

#include "layer/layers.h"

const struct layer_ops *const layers[] = {
	&raw_layer,   &sharded_layer, &distributed_layer, /* mappings */
	&file_layer,  &mem_layer,     &null_layer,        &s3_layer,
	&http_layer,  &https_layer,   &cache_layer,       &readahead_layer,
	&retry_layer, &delay_layer,   &fault_layer,       NULL,
};

static const struct layer_ops *added;

void layer_add(const struct layer_ops *ops)
{
	added = ops;
}

const struct layer_ops *layer_find(const char *name)
{
	for (unsigned i = 0; layers[i]; i++) {
		if (strcmp(layers[i]->name, name) == 0)
			return layers[i];
	}
	return added && strcmp(added->name, name) == 0 ? added : NULL;
}
