# SPDX-License-Identifier: GPL-3.0-or-later
#
# The whole build is this one file. `make help` lists what it can do.
#
# Sources are found by folder, so a new .c file needs no line here:
#   daemon/main.c + daemon/**/*.c     -> build/nbdrsd      (all but main.c through libnbdrs.a)
#   tool/nbdrs-attach.c, attach*.c   -> build/nbdrs-attach
#   tool/nbdrsctl.c                  -> build/nbdrsctl    (other tool/*.c: libtool.a, for both)
#   tests/unit/test_X.c              -> build/tests/test_X
#   tests/sim/test_X.c               -> build/sim/test_X, with the simulator (the other tests/sim/*.c)
#   tests/fuzz/fuzz_X.c              -> build/tests/replay_X, and by `make fuzz` build/fuzz/fuzz_X
#   tests/bench/nbdload*.c           -> build/nbdload
#
# Variables: BUILD=dir  CC=clang  V=1  PREFIX=/usr  DESTDIR=dir  SAN=address|thread  COV=1
#            HAVE_SYSTEMD=yes|no  FUZZ_SECONDS=20  SIM_SEEDS=10000  CI=true (warnings and skipped tests are errors)

VERSION := 0.1.0

ifeq ($(origin CC),default)
CC      := gcc
endif
AR      ?= ar
BUILD   ?= build
PREFIX  ?= /usr/local
PYTHON  ?= /usr/bin/python3
SAN     ?=
COV     ?=
FUZZ_SECONDS ?= 20
SIM_SEEDS ?= 10000

SBINDIR ?= $(PREFIX)/sbin
MANDIR  ?= $(PREFIX)/share/man
UNITDIR ?= $(PREFIX)/lib/systemd/system
UDEVDIR ?= $(PREFIX)/lib/udev/rules.d

# --- Debian packages: the only list -------------------------------------------------------------

DEPS_BUILD := gcc libc6-dev make pkg-config liburing-dev libnl-3-dev libnl-genl-3-dev \
              libjansson-dev libsystemd-dev libcurl4-openssl-dev libssl-dev libexpat1-dev scdoc \
              uthash-dev libxxhash-dev
DEPS_GUEST := qemu-system-x86 qemu-utils python3 busybox-static kmod udev systemd e2fsprogs util-linux \
              mount fdisk procps dmsetup iproute2 jq strace fio zstd xz-utils lz4 nbdkit \
              nbd-server nbd-client
DEPS_TEST  := libcmocka-dev clang libclang-rt-14-dev python3-clang-14 mandoc libnbd-bin \
              python3-libnbd file git radosgw ceph-mon ceph-osd ceph-common nginx-light
# Only what is compared with, beside what the tests need anyway.
DEPS_BENCH := s3backer nbdkit nbdkit-plugin-python python3-boto3 qemu-utils nbd-server fio
DEPS_LINT  := clang-format clang-tidy shellcheck gcovr valgrind

# --- Flags --------------------------------------------------------------------------------------

PKGS := liburing libnl-3.0 libnl-genl-3.0 jansson libcurl libcrypto expat
HAVE_SYSTEMD ?= $(shell pkg-config --exists libsystemd 2>/dev/null && echo yes || echo no)
ifeq ($(HAVE_SYSTEMD),yes)
PKGS += libsystemd
DEFINES += -DHAVE_SYSTEMD=1
endif
PKGS_MISSING := $(shell pkg-config --print-errors --exists $(PKGS) 2>&1 || echo missing)
PKG_CFLAGS   := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS     := $(shell pkg-config --libs $(PKGS) 2>/dev/null)

# -Wno-unused-parameter: the signatures of ops tables are fixed. -Wno-unused-result: gcc ignores
# the (void) by which the house style marks a deliberately dropped result; clang (make CC=clang,
# make tidy) honours it and keeps the check. -Wno-dangling-pointer: waiters queue a node on their own
# stack and unlink it before they return, which gcc does not see.
WARN := -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes -Wold-style-definition \
        -Wpointer-arith -Wvla -Wformat=2 -Wundef -Wwrite-strings -Wno-unused-parameter
IS_CLANG := $(findstring clang,$(shell $(CC) --version 2>/dev/null))
ifeq ($(IS_CLANG),)
WARN += -Wno-unused-result -Wno-dangling-pointer
endif
ifeq ($(CI),true)
WARN += -Werror
endif

OPT      := -O2 -g -fno-omit-frame-pointer
HARDEN   := -fstack-protector-strong -fstack-clash-protection -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
FRAME    := -Wframe-larger-than=2048
LDHARDEN := -pie -Wl,-z,relro,-z,now -Wl,--as-needed
ifneq ($(COV),)
OPT      := -O0 -g --coverage
HARDEN   :=
FRAME    :=
LDHARDEN := --coverage
endif
ifneq ($(SAN),)
# Instrumented frames are larger and fortify hides what the sanitizers want to see.
OPT      := -O1 -g -fno-omit-frame-pointer
HARDEN   :=
FRAME    :=
LDHARDEN := -pie
ifeq ($(SAN),address)
SANFLAGS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
else
SANFLAGS := -fsanitize=$(SAN)
endif
ifeq ($(IS_CLANG),)
# gcc's flow warnings misfire in instrumented code; the plain build has them.
WARN += -Wno-stringop-overread -Wno-maybe-uninitialized -Wno-format-truncation
endif
endif

DEFINES      += -D_GNU_SOURCE -DNBDRS_VERSION='"$(VERSION)"'
ALL_CPPFLAGS := -Iinclude -Idaemon -Itool $(DEFINES) $(PKG_CFLAGS) $(CPPFLAGS)
ALL_CFLAGS   := -std=gnu17 $(OPT) -fPIE -pthread $(WARN) $(HARDEN) $(SANFLAGS) $(CFLAGS)
ALL_LDFLAGS  := -pthread $(LDHARDEN) $(SANFLAGS) $(LDFLAGS)
ALL_LDLIBS   := $(PKG_LIBS) $(LDLIBS)

# --- Sources ------------------------------------------------------------------------------------

DAEMON_SRC := $(filter-out daemon/main.c,$(wildcard daemon/*.c daemon/*/*.c daemon/*/*/*.c daemon/*/*.S))
ATTACH_SRC := $(wildcard tool/nbdrs-attach.c tool/attach*.c)
CTL_SRC    := $(wildcard tool/nbdrsctl.c)
TOOL_SRC   := $(filter-out $(ATTACH_SRC) $(CTL_SRC),$(wildcard tool/*.c))
UNIT_SRC   := $(wildcard tests/unit/test_*.c)
UNIT_LIB   := $(filter-out $(UNIT_SRC),$(wildcard tests/unit/*.c))
SIM_SRC    := $(wildcard tests/sim/test_*.c)
SIM_LIB    := $(filter-out $(SIM_SRC),$(wildcard tests/sim/*.c))
FUZZ_SRC   := $(wildcard tests/fuzz/fuzz_*.c)
LOAD_SRC   := $(wildcard tests/bench/nbdload*.c)
MAN_SRC    := $(wildcard docs/man/*.scd)
UNITS      := $(wildcard udev/*.service udev/*.socket)
RULES      := $(wildcard udev/*.rules)

obj = $(patsubst %,$(BUILD)/obj/%.o,$(basename $(1)))

LIB       := $(BUILD)/libnbdrs.a
TOOLLIB   := $(BUILD)/libtool.a
TESTLIB   := $(BUILD)/libtestutil.a
SIMLIB    := $(BUILD)/libsim.a
BINS      := $(BUILD)/nbdrsd $(BUILD)/nbdrs-attach $(BUILD)/nbdrsctl
MANS      := $(MAN_SRC:docs/man/%.scd=$(BUILD)/man/%)
UNIT_BIN  := $(UNIT_SRC:tests/unit/%.c=$(BUILD)/tests/%)
SIM_BIN   := $(SIM_SRC:tests/sim/%.c=$(BUILD)/sim/%)
REPLAYS   := $(FUZZ_SRC:tests/fuzz/fuzz_%.c=$(BUILD)/tests/replay_%)
FUZZERS   := $(FUZZ_SRC:tests/fuzz/fuzz_%.c=$(BUILD)/fuzz_%)
BENCH_BIN := $(if $(LOAD_SRC),$(BUILD)/nbdload) \
             $(patsubst tests/bench/%.c,$(BUILD)/%,$(wildcard tests/bench/ceiling.c))
C_FILES   := $(wildcard daemon/*.c daemon/*/*.c daemon/*/*/*.c tool/*.c tests/*/*.c)
H_FILES   := $(wildcard include/nbdrs/*.h daemon/*.h daemon/*/*.h daemon/*/*/*.h tool/*.h tests/*/*.h)
ALL_C     := $(call obj,$(wildcard daemon/*.c) $(DAEMON_SRC) $(wildcard tool/*.c) $(UNIT_SRC) \
             $(UNIT_LIB) $(SIM_SRC) $(SIM_LIB) $(FUZZ_SRC) $(LOAD_SRC) $(wildcard tests/bench/ceiling.c))

# --- Rules --------------------------------------------------------------------------------------

ifeq ($(V),1)
Q :=
say = @:
else
Q := @
say = @printf '  %-7s %s\n' $(1) $(2)
endif

# Sub-makes inherit -j when given; else use every core.
SUBMAKE = $(MAKE) --no-print-directory $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(shell nproc))
SUITE = $(PYTHON) tests/run/suite --build $(BUILD)

.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all
.PHONY: help all bins man tests deps deps-bench deps-build deps-demo deps-lint demo check check-all check-unit sim \
	check-int check-guest check-san check-asan check-tsan bench fuzz lint tidy format cov \
	install uninstall clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | \
		while IFS="$$(printf '\t')" read -r t d; do printf '  %-12s %s\n' "$$t" "$$d"; done

all: bins man ## build nbdrsd, nbdrs-attach, nbdrsctl and the man pages (default)
bins: $(BINS)
man: $(MANS)
tests: $(UNIT_BIN) $(SIM_BIN) $(REPLAYS) $(BENCH_BIN)

# Objects depend on this file, whose content is the command line: changed flags rebuild everything.
FLAGS_NOW := $(CC) $(ALL_CPPFLAGS) $(ALL_CFLAGS) $(ALL_LDFLAGS) $(ALL_LDLIBS)
$(BUILD)/flags: FORCE
	@$(if $(PKGS_MISSING),echo 'nbdrs: missing libraries (run "make deps" as root):' >&2; \
		pkg-config --print-errors --exists $(PKGS); exit 1)
	@mkdir -p $(@D)
	@printf '%s\n' '$(subst ','\'',$(FLAGS_NOW))' | cmp -s - $@ || \
		printf '%s\n' '$(subst ','\'',$(FLAGS_NOW))' >$@

$(BUILD)/obj/daemon/%.o: ALL_CFLAGS += $(FRAME)

$(BUILD)/obj/%.o: %.c $(BUILD)/flags
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CPPFLAGS) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/obj/%.o: %.S $(BUILD)/flags
	$(call say,AS,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CPPFLAGS) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

-include $(ALL_C:.o=.d)

# Removed first: ar would keep the members of sources that are gone.
$(LIB): $(call obj,$(DAEMON_SRC))
$(TOOLLIB): $(call obj,$(TOOL_SRC))
$(TESTLIB): $(call obj,$(UNIT_LIB))
$(SIMLIB): $(call obj,$(SIM_LIB))
$(LIB) $(TOOLLIB) $(TESTLIB) $(SIMLIB): $(BUILD)/flags
	$(call say,AR,$@)
	$(Q)rm -f $@
	$(Q)$(AR) rcs $@ $(filter %.o,$^)

link = $(Q)$(CC) $(ALL_LDFLAGS) -o $@ $(filter %.o,$^) $(filter %.a,$^) $(1) $(ALL_LDLIBS)

$(BUILD)/nbdrsd: $(BUILD)/obj/daemon/main.o $(LIB)
	$(call say,LD,$@)
	$(call link)

$(BUILD)/nbdrs-attach: $(call obj,$(ATTACH_SRC)) $(TOOLLIB) $(LIB)
$(BUILD)/nbdrsctl: $(call obj,$(CTL_SRC)) $(TOOLLIB) $(LIB)
$(BUILD)/nbdrs-attach $(BUILD)/nbdrsctl:
	$(call say,LD,$@)
	$(call link)

$(UNIT_BIN): $(BUILD)/tests/%: $(BUILD)/obj/tests/unit/%.o $(TESTLIB) $(TOOLLIB) $(LIB)
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$(call link,-lcmocka)

$(SIM_BIN): $(BUILD)/sim/%: $(BUILD)/obj/tests/sim/%.o $(SIMLIB) $(LIB)
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$(call link)

$(REPLAYS): $(BUILD)/tests/replay_%: $(BUILD)/obj/tests/fuzz/fuzz_%.o \
		$(BUILD)/obj/tests/fuzz/replay.o $(TOOLLIB) $(LIB)
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$(call link)

$(BUILD)/nbdload: $(call obj,$(LOAD_SRC)) $(LIB)
$(BUILD)/ceiling: $(BUILD)/obj/tests/bench/ceiling.o $(LIB)
$(BUILD)/nbdload $(BUILD)/ceiling:
	$(call say,LD,$@)
	$(call link)

$(BUILD)/man/%: docs/man/%.scd
	$(call say,MAN,$@)
	@mkdir -p $(@D)
	$(Q)scdoc <$< >$@

# --- Packages -----------------------------------------------------------------------------------

deps: ## install what build and tests need (Debian, root; instant when all is there)
	@tests/run/deps $(DEPS_BUILD) $(DEPS_GUEST) $(DEPS_TEST)
deps-build: ## install only what the build needs
	@tests/run/deps $(DEPS_BUILD)
deps-demo: ## install what the build and the demo need
	@tests/run/deps $(DEPS_BUILD) $(DEPS_GUEST)
deps-bench: ## install what the benchmark compares with
	@tests/run/deps $(DEPS_BUILD) $(DEPS_TEST) $(DEPS_BENCH)
deps-lint: ## install what tidy, format, cov and the full lint need
	@tests/run/deps $(DEPS_BUILD) $(DEPS_TEST) $(DEPS_LINT)

# --- Running ------------------------------------------------------------------------------------
# pkg-config is asked when this file is read, so whatever follows `deps` is a second make.

demo: deps-demo ## serve a disk, use it as /dev/nbd0, say how to go on
	+@$(SUBMAKE) bins
	@BUILD=$(BUILD) tests/demo/demo.sh

check: deps ## every test on both I/O engines; ends with 'N passed, N failed, N skipped'
	+@$(SUBMAKE) all tests
	@$(SUITE) lint unit sim int guest

check-unit: bins tests ## unit tests, fuzz corpora, simulations
	@$(SUITE) unit sim
sim: $(SIM_BIN) ## the simulations with SIM_SEEDS seeds each (10000)
	@SIM_SEEDS=$(SIM_SEEDS) $(SUITE) --timeout 3600 sim
check-int: bins tests ## real clients against the daemon
	@$(SUITE) int
check-guest: bins ## real kernel in a guest
	@$(SUITE) guest

check-asan: ## unit and integration tests with AddressSanitizer and UBSan
	+@$(SUBMAKE) SAN=address BUILD=$(BUILD)/asan bins tests
	@$(PYTHON) tests/run/suite --build $(BUILD)/asan --sanitizer address unit sim int
check-tsan: ## unit and integration tests with ThreadSanitizer
	+@$(SUBMAKE) SAN=thread BUILD=$(BUILD)/tsan bins tests
	@$(PYTHON) tests/run/suite --build $(BUILD)/tsan --sanitizer thread unit int

bench: bins $(BENCH_BIN) ## compare with nbdkit, qemu-nbd, nbd-server, s3backer (BENCH="local|remote --quick")
	@BUILD=$(BUILD) tests/bench/run

fuzz: ## run each fuzzer for FUZZ_SECONDS
	+@$(SUBMAKE) CC=clang SAN=fuzzer-no-link,address BUILD=$(BUILD)/fuzz fuzzers
	@tests/run/fuzz $(BUILD)/fuzz $(FUZZ_SECONDS)

.PHONY: fuzzers
fuzzers: $(FUZZERS)
$(FUZZERS): $(BUILD)/fuzz_%: $(BUILD)/obj/tests/fuzz/fuzz_%.o $(TOOLLIB) $(LIB)
	$(call say,LD,$@)
	$(call link,-fsanitize=fuzzer)

# --- Quality ------------------------------------------------------------------------------------

lint: ## house rules: who may wait, SPDX, markers, sizes, man pages, scripts
	@BUILD=$(BUILD) tests/lint/run all

tidy: ## clang-tidy
	@printf '%s\n' $(C_FILES) | xargs -r -P $(shell nproc) -I{} clang-tidy --quiet \
		$(if $(filter true,$(CI)),--warnings-as-errors='*') {} -- $(ALL_CPPFLAGS) -std=gnu17

format: ## clang-format all C
	@clang-format -i $(C_FILES) $(H_FILES)

cov: ## coverage of the unit and integration tests
	+@$(SUBMAKE) COV=1 BUILD=$(BUILD)/cov bins tests
	-@$(PYTHON) tests/run/suite --build $(BUILD)/cov unit int
	@gcovr --root . --filter daemon/ --filter tool/ --print-summary $(BUILD)/cov

# --- Installing ---------------------------------------------------------------------------------

# Units and rules name the programs as @SBINDIR@.
install: all ## install into $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(SBINDIR)
	install -m 755 $(BINS) $(DESTDIR)$(SBINDIR)
	set -e; for m in $(MANS); do s=$${m##*.}; install -D -m 644 $$m \
		$(DESTDIR)$(MANDIR)/man$$s/$${m##*/}; done
	set -e; for u in $(UNITS); do install -d $(DESTDIR)$(UNITDIR); \
		sed 's|@SBINDIR@|$(SBINDIR)|g' $$u >$(DESTDIR)$(UNITDIR)/$${u##*/}; done
	set -e; for r in $(RULES); do install -d $(DESTDIR)$(UDEVDIR); \
		sed 's|@SBINDIR@|$(SBINDIR)|g' $$r >$(DESTDIR)$(UDEVDIR)/$${r##*/}; done

uninstall: ## remove what install put there
	rm -f $(BINS:$(BUILD)/%=$(DESTDIR)$(SBINDIR)/%)
	for m in $(MANS); do rm -f $(DESTDIR)$(MANDIR)/man$${m##*.}/$${m##*/}; done
	rm -f $(UNITS:udev/%=$(DESTDIR)$(UNITDIR)/%) $(RULES:udev/%=$(DESTDIR)$(UDEVDIR)/%)

clean: ## remove the build folder
	rm -rf $(BUILD)
