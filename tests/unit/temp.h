/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Folders of tests.
 */
#ifndef NBDRS_TEST_TEMP_H
#define NBDRS_TEST_TEMP_H

/* Makes one where tests may write (conform_tmp()). Its path is the caller's, for temp_remove_free(). Asserts. */
char *temp_folder(void);

/* Removes it with all that is in it. 0, or not. */
int temp_remove(const char *path);

/* The same, and frees the path. Asserts. */
void temp_remove_free(char *path);

#endif
