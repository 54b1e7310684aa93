// A plugin of qemu-user 7.2 (Debian 12: qemu-user) that counts what a program of one thread executes, and with sizes of
// caches the lines that it gets from memory.
//
//     cc -O2 -shared -fPIC -o count.so count.c
//     qemu-aarch64 -plugin ./count.so,out=FILE[,l1=KB,l2=KB[,l3=KB]] PROGRAM...
//
// FILE gets two numbers: instructions, and bytes from memory (0 without sizes). Caches hold lines of 64 bytes in sets
// of 16, the one longest unused goes first, data only; a line that is found in no cache enters all of them. What
// processors fetch ahead by themselves is not simulated: for weights that are read in order it changes when they come,
// not how often.
//
// Debian ships no qemu-plugin.h: what is used of the published interface is declared here.

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

typedef struct qemu_info qemu_info;
typedef struct block     block;
typedef struct insn      insn;
typedef void (*translated)(uint64_t id, block *);
typedef void (*accessed)(unsigned cpu, uint32_t what, uint64_t address, void *);
typedef void (*ended)(uint64_t id, void *);

enum { ADD_U64 };  // qemu_plugin_op
enum { NO_REGS };  // qemu_plugin_cb_flags
enum { ALL = 3 };  // qemu_plugin_mem_rw

void     qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, translated);
void     qemu_plugin_register_vcpu_tb_exec_inline(block *, int op, void * sum, uint64_t value);
void     qemu_plugin_register_vcpu_mem_cb(insn *, accessed, int flags, int rw, void *);
void     qemu_plugin_register_atexit_cb(uint64_t id, ended, void *);
size_t   qemu_plugin_tb_n_insns(const block *);
insn *   qemu_plugin_tb_get_insn(const block *, size_t i);
unsigned qemu_plugin_mem_size_shift(uint32_t what);

PUBLIC int qemu_plugin_version = 1;

enum { WAYS = 16, LINE = 64, LEVELS = 3 };

typedef struct {
    uint64_t   n_sets;
    uint64_t * lines;  // (n_sets, WAYS) numbers of lines + 1, the latest first
} cache;

static const char * out = "counts.txt";
static cache        caches[LEVELS];
static int          n_levels;
static uint64_t     n_insns;
static uint64_t     n_lines;  // from memory
static uint64_t     warm, from;
static uint64_t     latest;  // line that was accessed

// Whether the cache had the line; it has now.
static bool found(cache * c, uint64_t line) {
    uint64_t * set = c->lines + line % c->n_sets * WAYS;
    int        at  = 0;
    while (at < WAYS - 1 && set[at] != line + 1) {
        ++at;
    }
    const bool hit = set[at] == line + 1;
    memmove(set + 1, set, at * sizeof *set);
    set[0] = line + 1;
    return hit;
}

static void access_memory(unsigned cpu, uint32_t what, uint64_t address, void * data) {
    (void) cpu, (void) data;
    if (n_insns < warm) {
        return;
    }
    const uint64_t last = (address + (1u << qemu_plugin_mem_size_shift(what)) - 1) / LINE;
    for (uint64_t line = address / LINE; line <= last; ++line) {
        if (line == latest) {
            continue;
        }
        latest    = line;
        int level = 0;
        while (level < n_levels && !found(&caches[level], line)) {
            ++level;
        }
        n_lines += level == n_levels && n_insns >= from;
    }
}

static void translate(uint64_t id, block * b) {
    (void) id;
    const size_t n = qemu_plugin_tb_n_insns(b);
    qemu_plugin_register_vcpu_tb_exec_inline(b, ADD_U64, &n_insns, n);
    for (size_t i = 0; n_levels > 0 && i < n; ++i) {
        qemu_plugin_register_vcpu_mem_cb(qemu_plugin_tb_get_insn(b, i), access_memory, NO_REGS, ALL, NULL);
    }
}

static void finish(uint64_t id, void * data) {
    (void) id, (void) data;
    FILE * file = fopen(out, "w");
    if (file) {
        fprintf(file, "%" PRIu64 " %" PRIu64 "\n", n_insns, n_lines * LINE);
        fclose(file);
    }
}

PUBLIC int qemu_plugin_install(uint64_t id, const qemu_info * info, int argc, char ** argv) {
    (void) info;
    for (int i = 0; i < argc; ++i) {
        if (strncmp(argv[i], "out=", 4) == 0) {
            out = strdup(argv[i] + 4);
        } else if (strncmp(argv[i], "warm=", 5) == 0) {
            warm = strtoull(argv[i] + 5, NULL, 10);
        } else if (strncmp(argv[i], "from=", 5) == 0) {
            from = strtoull(argv[i] + 5, NULL, 10);
        } else if (argv[i][0] == 'l' && n_levels < LEVELS) {  // l1=32, in order
            cache * c = &caches[n_levels++];
            c->n_sets = strtoull(argv[i] + 3, NULL, 10) * 1024 / LINE / WAYS;
            c->lines  = calloc(c->n_sets * WAYS, sizeof *c->lines);
        }
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_atexit_cb(id, finish, NULL);
    return 0;
}
