/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * nbdrsd: serves block volumes over NBD. The command line says what to do (cmd/args.c), the commands do
 * it (cmd/serve.c, cmd/volume.c, cmd/help.c).
 */
#include "cmd/cmd.h"

int main(int argc, char **argv)
{
	struct args a;
	int code;

	if (args_parse(argc, argv, &a, &code) == 0) {
		log_set_level(a.log_level);
		code = a.run(&a);
	}
	args_free(&a);
	return code;
}
