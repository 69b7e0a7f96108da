/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Names of devices, exports and links: see names.h. */
#include "names.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "nbdrs/ascii.h"

/* ctype.h without the locale: identifiers must not depend on LANG. */
static bool is_plain(char c)
{
	return ascii_is_alnum(c) || c == '.' || c == '_' || c == '-';
}

/* The end of an identifier. */
static bool is_identity(const char *p)
{
	return *p == *BACKEND_IDENTITY && identity_is_valid(p + 1);
}

/* Parses "[/dev/]nbdN"; what follows the number, NULL when it is not such a name. */
static const char *parse_index(const char *text, uint32_t *index)
{
	uint32_t v = 0;
	const char *p = text;

	if (strncmp(p, "/dev/", 5) == 0)
		p += 5;
	if (strncmp(p, "nbd", 3) != 0)
		return NULL;
	p += 3;
	if (!ascii_is_digit(*p) || (*p == '0' && ascii_is_digit(p[1])))
		return NULL;
	for (; ascii_is_digit(*p); p++) {
		v = v * 10 + (uint32_t)(*p - '0');
		if (v > DEVICE_INDEX_MAX)
			return NULL;
	}
	*index = v;
	return p;
}

int name_to_index(const char *text, uint32_t *index)
{
	uint32_t v;
	const char *end = parse_index(text, &v);

	if (!end || *end)
		return -EINVAL;
	*index = v;
	return 0;
}

bool name_is_partition(const char *text)
{
	uint32_t v;
	const char *p = parse_index(text, &v);

	if (!p || *p++ != 'p' || !ascii_is_digit(*p))
		return false;
	while (ascii_is_digit(*p))
		p++;
	return !*p;
}

int name_from_backend(const char *backend, char *out)
{
	char name[EXPORT_NAME_LEN];
	const char *p = backend;
	size_t n = 0;

	if (strncmp(p, BACKEND_PREFIX, strlen(BACKEND_PREFIX)) != 0)
		return -EINVAL;
	for (p += strlen(BACKEND_PREFIX); *p && !is_identity(p); p++) {
		if (n + 1 >= sizeof(name))
			return -EINVAL;
		if (*p == '%') {
			int byte = ascii_percent(p);

			if (byte <= 0)
				return -EINVAL;
			name[n++] = (char)byte;
			p += 2;
		} else if (is_plain(*p)) {
			name[n++] = *p;
		} else {
			return -EINVAL;
		}
	}
	if (n == 0)
		return -EINVAL;
	name[n] = '\0';
	memcpy(out, name, n + 1);
	return 0;
}

int name_to_backend(const char *export, char *out, size_t out_len)
{
	size_t n = strlen(BACKEND_PREFIX);

	if (out_len <= n)
		return -ENAMETOOLONG;
	memcpy(out, BACKEND_PREFIX, n + 1);
	for (const char *p = export; *p; p++) {
		const size_t need = is_plain(*p) ? 1 : 3;

		if (n + need >= out_len)
			return -ENAMETOOLONG;
		if (need == 1)
			out[n] = *p;
		else
			(void)snprintf(out + n, 4, "%%%02X", (unsigned char)*p);
		n += need;
	}
	out[n] = '\0';
	return 0;
}

int name_to_link(const char *backend, char *out)
{
	char name[EXPORT_NAME_LEN];
	char link[LINK_NAME_LEN];
	size_t n = 0;

	if (name_from_backend(backend, name) || name[0] == '.')
		return -EINVAL;
	for (const char *p = backend + strlen(BACKEND_PREFIX); *p && *p != *BACKEND_IDENTITY; p++) {
		if (n + 4 + strlen("nbdrs--part31") >= sizeof(link))
			return -EINVAL;
		if (*p == '%') {
			/* As udev itself writes them: \x2f. */
			n += (size_t)snprintf(link + n, 5, "\\x%02x", (unsigned)ascii_percent(p));
			p += 2;
		} else {
			link[n++] = *p;
		}
	}
	link[n] = '\0';
	memcpy(out, link, n + 1);
	return 0;
}
