/* workload MIB SECONDS [PROCESSES]: more memory than the machine has, each byte of it verified.
 *
 * Every process (1) has a share of MIB. All fill their anonymous memory, visit its pages in random order for SECONDS,
 * verifying each and rewriting every second one with another version, and at the end verify all of them once more.
 * Half of a page compresses. Seconds and not passes: how fast an emulated machine is depends on who else uses the host.
 *
 * Prints one line of NAME=NUMBER words; a bad page is named on a line of its own, the first few of them. Exit status
 * 1 when a page was bad: empty (all zeros), stale (an older version of the same page), foreign (another page's
 * content), altered (anything else).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define NAMED_MAX 5

enum { RIGHT, EMPTY, STALE, FOREIGN, ALTERED, KINDS };
static const char *const names[KINDS] = {"right", "empty", "stale", "foreign", "altered"};

static uint64_t scramble(uint64_t x) {
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93ull;
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93ull;
    return x ^ x >> 32;
}

/* The page's number, its version, noise that follows from both, and one word of it over and over. */
static void fill(uint64_t *page, uint64_t number, uint64_t version) {
    uint64_t word = scramble(number << 20 | version) | 1;
    page[0] = number + 1;
    page[1] = version;
    for (int i = 2; i < WORDS / 2; i++) page[i] = word = word * 6364136223846793005ull + 1442695040888963407ull;
    for (int i = WORDS / 2; i < WORDS; i++) page[i] = word;
}

static int matches(const uint64_t *page, uint64_t number, uint64_t version) {
    static uint64_t expected[WORDS];
    fill(expected, number, version);
    return !memcmp(page, expected, PAGE);
}

static int judge(const uint64_t *page, uint64_t number, uint64_t version, uint64_t pages) {
    static const uint64_t zeros[WORDS];
    if (matches(page, number, version)) return RIGHT;
    if (!memcmp(page, zeros, PAGE)) return EMPTY;
    if (page[0] == number + 1 && page[1] < version && matches(page, number, page[1])) return STALE;
    if (page[0] && page[0] <= pages && page[0] != number + 1 && matches(page, page[0] - 1, page[1])) return FOREIGN;
    return ALTERED;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/* Of all processes. */
static struct totals {
    uint64_t visits, counts[KINDS];
} *totals;

static uint64_t total_pages;

static void verify(const uint64_t *page, uint64_t number, uint64_t version) {
    int kind = judge(page, number, version, total_pages);
    uint64_t bad = kind == RIGHT ? 0 : totals->counts[EMPTY] + totals->counts[STALE] + totals->counts[FOREIGN] +
                                           totals->counts[ALTERED] + 1;
    __atomic_fetch_add(&totals->counts[kind], 1, __ATOMIC_RELAXED);
    if (bad && bad <= NAMED_MAX)
        printf("page %llu, version %llu: %s\n", (unsigned long long)number, (unsigned long long)version, names[kind]);
}

/* One process's share, pages first to first + pages - 1. Returns when it was filled; exits with 2 on failure. */
static double work(uint64_t first, uint64_t pages, double seconds) {
    uint64_t visits = 0, dice = first + 1;
    mlockall(MCL_CURRENT); /* what it verifies with is not among what it verifies */
    uint8_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint16_t *versions = calloc(pages, sizeof *versions);
    if (memory == MAP_FAILED || !versions || mlock(versions, pages * sizeof *versions)) {
        perror("workload");
        exit(2);
    }
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE); /* pages are counted one by one */
    for (uint64_t i = 0; i < pages; i++) fill((uint64_t *)(memory + i * PAGE), first + i, 0);
    double filled = now();
    for (; now() - filled < seconds; visits++) {
        dice = dice * 6364136223846793005ull + 1442695040888963407ull;
        uint64_t i = (dice >> 20) % pages;
        uint64_t *page = (uint64_t *)(memory + i * PAGE);
        verify(page, first + i, versions[i]);
        if (visits % 2 && versions[i] < UINT16_MAX) fill(page, first + i, ++versions[i]);
    }
    for (uint64_t i = 0; i < pages; i++) verify((uint64_t *)(memory + i * PAGE), first + i, versions[i]);
    __atomic_fetch_add(&totals->visits, visits, __ATOMIC_RELAXED);
    return filled;
}

int main(int count, char **words) {
    if (count != 3 && count != 4) return fprintf(stderr, "usage: workload MIB SECONDS [PROCESSES]\n"), 2;
    setvbuf(stdout, NULL, _IOLBF, 0); /* what was bad is known even if SIGBUS comes next */
    uint64_t processes = count == 4 ? strtoull(words[3], NULL, 10) : 1;
    double seconds = strtod(words[2], NULL), begin = now();
    total_pages = strtoull(words[1], NULL, 10) << 8;
    totals = mmap(NULL, sizeof *totals, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (totals == MAP_FAILED || processes < 1 || processes > total_pages) return perror("workload"), 2;
    uint64_t share = total_pages / processes, first = 0;
    for (; first + 2 * share <= total_pages; first += share) {
        pid_t child = fork();
        if (child < 0) return perror("workload"), 2;
        if (child == 0) {
            work(first, share, seconds);
            return 0;
        }
    }
    double filled = work(first, total_pages - first, seconds);
    int failed = 0, status;
    while (wait(&status) > 0) failed |= status;
    printf("pages=%llu visits=%llu verified=%llu", (unsigned long long)total_pages,
           (unsigned long long)totals->visits, (unsigned long long)(totals->visits + total_pages));
    for (int kind = 0; kind < KINDS; kind++) printf(" %s=%llu", names[kind], (unsigned long long)totals->counts[kind]);
    printf(" fill_ms=%.0f total_ms=%.0f\n", (filled - begin) * 1e3, (now() - begin) * 1e3);
    return failed || totals->counts[RIGHT] != totals->visits + total_pages;
}
