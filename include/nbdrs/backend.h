/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * By what the kernel knows whose a device is (NBD_ATTR_BACKEND_IDENTIFIER): "nbdrs." and the export's name with every
 * byte outside of A-Z a-z 0-9 . _ - written as %XX; where the volume has an identity (nbdrs/identity.h) "~" and that.
 */
#ifndef NBDRS_BACKEND_H
#define NBDRS_BACKEND_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define BACKEND_PREFIX	 "nbdrs."
#define BACKEND_IDENTITY "~"

enum { IDENTITY_LEN = 16, BLOCK_SIZE_MIN = 512 };

/* Whether a text is one: 16 digits. */
static inline bool identity_is_valid(const char *text)
{
	return strlen(text) == IDENTITY_LEN && strspn(text, "0123456789abcdef") == IDENTITY_LEN;
}

static inline bool backend_has_identity(const char *backend)
{
	return strstr(backend, BACKEND_IDENTITY);
}

/* The bytes of a device with such blocks (0 = not known) on a volume: whole blocks only. */
static inline uint64_t device_bytes(uint64_t volume, uint64_t block_size)
{
	return volume - volume % (block_size ? block_size : BLOCK_SIZE_MIN);
}

/*
 * Whether a device of `size` bytes may go on over that volume. One with an identity may have been made larger without
 * the device, when something died between the two; for one without its size is half of what it is known by.
 */
static inline bool backend_fits(const char *backend, uint64_t size, uint64_t block_size, uint64_t volume)
{
	return backend_has_identity(backend) ? size <= volume : size == device_bytes(volume, block_size);
}

#endif
