/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * `help` and `layers`: what the registry knows, for people.
 */
#include "cmd/cmd.h"

#include <stdio.h>

static int help_layer(const char *name)
{
	const struct layer_ops *ops = layer_find(name);

	if (!ops) {
		cmd_complain("there is no layer '%s'; `nbdrsd layers` lists them", name);
		return CMD_USAGE;
	}
	printf("%s: %s\n\nIn a chain: %s%s%s%s\n", ops->name, ops->help, ops->name,
	       ops->opts && ops->opts->name ? "[OPTION=VALUE,...]" : "", ops->takes_target ? ":TARGET" : "",
	       ops->max_kids > 1 ? "{CHAIN,...}" : ops->max_kids == 1 ? ":CHAIN" : "");
	if (ops->opts && ops->opts->name) {
		printf("\nOptions:\n");
		opts_print(ops->opts, stdout);
	}
	return CMD_OK;
}

int cmd_help(const struct args *a)
{
	if (a->topic)
		return help_layer(a->topic);
	args_print_help();
	return CMD_OK;
}

int cmd_layers(const struct args *a)
{
	(void)a; /* takes nothing */
	for (const struct layer_ops *const *l = layers; *l; l++)
		printf("%-12s %s\n", (*l)->name, (*l)->help);
	return CMD_OK;
}
