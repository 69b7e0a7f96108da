/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The options of all layers that speak HTTP. Their instances have these members: conns, timeout_ns, connect_ns,
 * ca_file, is_insecure, resolve.
 */
#ifndef NBDRS_LAYER_HTTP_OPTIONS_H
#define NBDRS_LAYER_HTTP_OPTIONS_H

#include <stddef.h>

#include "nbdrs/http.h"
#include "nbdrs/opt.h"

#define HTTP_TIMEOUT_MAX_NS UINT64_C(3600000000000)

/* Rows of an option table. */
#define HTTP_OPTIONS(type_)                                                                        \
	{ .name = "conns",                                                                         \
	  .type = OPT_UINT,                                                                        \
	  .field = offsetof(type_, conns),                                                         \
	  .def = "64",                                                                             \
	  .min = 1,                                                                                \
	  .max = HTTP_CONNS_MAX,                                                                   \
	  .help = "requests at a time on each reactor" },                                          \
	{ .name = "timeout",                                                                       \
	  .type = OPT_TIME_NS,                                                                     \
	  .field = offsetof(type_, timeout_ns),                                                    \
	  .def = "30s",                                                                            \
	  .min = 1000000,                                                                          \
	  .max = HTTP_TIMEOUT_MAX_NS,                                                              \
	  .help = "for one request" },                                                             \
	{ .name = "connect_timeout",                                                               \
	  .type = OPT_TIME_NS,                                                                     \
	  .field = offsetof(type_, connect_ns),                                                    \
	  .def = "10s",                                                                            \
	  .min = 1000000,                                                                          \
	  .max = HTTP_TIMEOUT_MAX_NS,                                                              \
	  .help = "for a connection" },                                                            \
	{ .name = "ca_file",                                                                       \
	  .type = OPT_STR,                                                                         \
	  .field = offsetof(type_, ca_file),                                                       \
	  .help = "certificates of authorities to trust (PEM), instead of the system's" },         \
	{ .name = "insecure",                                                                      \
	  .type = OPT_BOOL,                                                                        \
	  .field = offsetof(type_, is_insecure),                                                   \
	  .def = "off",                                                                            \
	  .help = "do not verify the server's certificate" },                                      \
	{ .name = "resolve",                                                                       \
	  .type = OPT_STR,                                                                         \
	  .field = offsetof(type_, resolve),                                                       \
	  .help = "HOST:PORT:ADDRESS, to be used instead of what the DNS says" }

#endif
