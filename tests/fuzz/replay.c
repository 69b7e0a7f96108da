/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Runs a fuzz target over stored inputs, without libFuzzer: replay_X FILE|FOLDER...
 * Built with the ordinary compiler, so `make check` sees every input that once mattered. Each input
 * is also cut short at every length up to CUT_MAX: truncation is what networks and disks do.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"

#define CUT_MAX 512
#define INPUT_MAX (1 << 20)

static unsigned run_n;

/* The target sees an exact heap copy, so that a sanitizer or valgrind notices one byte too far. */
static void run_copy(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size ? size : 1);

	if (!copy)
		abort();
	memcpy(copy, data, size);
	(void)LLVMFuzzerTestOneInput(copy, size);	/* always 0 by libFuzzer's contract */
	free(copy);
}

static int run_file(const char *path)
{
	static uint8_t buf[INPUT_MAX];
	FILE *f = fopen(path, "rb");

	if (!f) {
		fprintf(stderr, "replay: %s: %s\n", path, strerror(errno));
		return 1;
	}
	size_t len = fread(buf, 1, sizeof(buf), f);
	int bad = ferror(f);

	fclose(f);
	if (bad) {
		fprintf(stderr, "replay: %s: read error\n", path);
		return 1;
	}
	/* Printed first: after a crash the last line names the culprit. */
	printf("# %s (%zu bytes)\n", path, len);
	fflush(stdout);
	for (size_t cut = 0; cut < len && cut < CUT_MAX; cut++)
		run_copy(buf, cut);
	run_copy(buf, len);
	run_n++;
	return 0;
}

static int run_dir(const char *path)
{
	struct dirent **names;
	int n = scandir(path, &names, NULL, alphasort);
	int rc = 0;

	if (n < 0) {
		fprintf(stderr, "replay: %s: %s\n", path, strerror(errno));
		return 1;
	}
	for (int i = 0; i < n; i++) {
		char file[4096];

		if (names[i]->d_name[0] != '.') {
			snprintf(file, sizeof(file), "%s/%s", path, names[i]->d_name);
			rc |= run_file(file);
		}
		free(names[i]);
	}
	free(names);
	return rc;
}

int main(int argc, char **argv)
{
	int rc = 0;

	for (int i = 1; i < argc; i++) {
		struct stat st;

		if (stat(argv[i], &st) == 0 && S_ISDIR(st.st_mode))
			rc |= run_dir(argv[i]);
		else
			rc |= run_file(argv[i]);
	}
	if (rc == 0 && run_n == 0) {
		fprintf(stderr, "replay: no inputs; usage: %s FILE|FOLDER...\n", argv[0]);
		return 1;
	}
	printf("# %u inputs\n", run_n);
	return rc;
}
