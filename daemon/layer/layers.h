/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Every layer's operations, for the registry.
 */
#ifndef NBDRS_LAYER_LAYERS_H
#define NBDRS_LAYER_LAYERS_H

#include "nbdrs/layer.h"

extern const struct layer_ops raw_layer;
extern const struct layer_ops cache_layer;
extern const struct layer_ops sharded_layer;
extern const struct layer_ops file_layer;
extern const struct layer_ops mem_layer;
extern const struct layer_ops null_layer;
extern const struct layer_ops delay_layer;
extern const struct layer_ops fault_layer;
extern const struct layer_ops distributed_layer;
extern const struct layer_ops readahead_layer;
extern const struct layer_ops s3_layer;
extern const struct layer_ops retry_layer;
extern const struct layer_ops http_layer;
extern const struct layer_ops https_layer;

/* Not in the registry: what stands in a store's place where objects are wanted (see layer_ops.keyed). */
extern const struct layer_ops mem_store_layer;
extern const struct layer_ops file_store_layer;
extern const struct layer_ops s3_store_layer;

#endif
