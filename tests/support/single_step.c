/* Runs the calling thread one instruction at a time, and ends its process at a chosen one.
 *
 * The processor's trap flag raises SIGTRAP after every instruction. Counted are those in the given ranges of addresses,
 * and all others while a given word is not 0, such as the instructions of a memset under a lock. x86-64 only. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <ucontext.h>
#include <unistd.h>

enum { MOST = 64 };
static uintptr_t starts[MOST], ends[MOST];
static const volatile uint32_t *words[MOST];
static int range_count, word_count;
static volatile long seen, last;

static int is_inside(uintptr_t at) {
    for (int i = 0; i < range_count; i++)
        if (at >= starts[i] && at < ends[i]) return 1;
    for (int i = 0; i < word_count; i++)
        if (*words[i]) return 1;
    return 0;
}

static void on_trap(int signal, siginfo_t *info, void *context) {
    (void) signal, (void) info;
    if (is_inside((uintptr_t) ((ucontext_t *) context)->uc_mcontext.gregs[REG_RIP]) && ++seen == last)
        kill(getpid(), SIGKILL);
}

void add_range(uintptr_t start, uintptr_t end) {
    starts[range_count] = start;
    ends[range_count++] = end;
}

void add_word(uintptr_t address) { words[word_count++] = (const volatile uint32_t *) address; }

/* From here on; `dies_at` 0 = never. */
void begin_steps(long dies_at) {
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    sigaction(SIGTRAP, &action, NULL);
    seen = 0;
    last = dies_at;
    __asm__ volatile("pushfq\n\torq $0x100, (%%rsp)\n\tpopfq" ::: "memory", "cc");
}

/* How many were counted. */
long end_steps(void) {
    __asm__ volatile("pushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq" ::: "memory", "cc");
    return seen;
}
