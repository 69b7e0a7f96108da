/* SPDX-License-Identifier: GPL-3.0-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "temp.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>

#include "conformance.h"

char *temp_folder(void)
{
	char *path = NULL;

	assert_true(asprintf(&path, "%s/nbdrs-test-XXXXXX", conform_tmp()) > 0);
	assert_non_null(mkdtemp(path));
	return path;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
	return remove(path);
}

int temp_remove(const char *path)
{
	return nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

void temp_remove_free(char *path)
{
	assert_int_equal(temp_remove(path), 0);
	free(path);
}
