/* workload MIB SECONDS: more memory than the machine has, each byte of it verified.
 *
 * Fills MIB of anonymous memory, visits its pages in random order for SECONDS, verifying each and rewriting every
 * second one with another version, and at the end verifies all of them once more. Half of a page compresses. Seconds
 * and not passes: how fast an emulated machine is depends on who else uses the host.
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
#include <time.h>

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

static uint64_t counts[KINDS];

static void verify(const uint64_t *page, uint64_t number, uint64_t version, uint64_t pages) {
    int kind = judge(page, number, version, pages);
    counts[kind]++;
    if (kind != RIGHT && counts[EMPTY] + counts[STALE] + counts[FOREIGN] + counts[ALTERED] <= NAMED_MAX)
        printf("page %llu, version %llu: %s\n", (unsigned long long)number, (unsigned long long)version, names[kind]);
}

int main(int count, char **words) {
    if (count != 3) return fprintf(stderr, "usage: workload MIB SECONDS\n"), 2;
    setvbuf(stdout, NULL, _IOLBF, 0); /* what was bad is known even if SIGBUS comes next */
    uint64_t pages = strtoull(words[1], NULL, 10) << 8, visits = 0, dice = 1;
    double seconds = strtod(words[2], NULL), begin = now();
    mlockall(MCL_CURRENT); /* what it verifies with is not among what it verifies */
    uint8_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint16_t *versions = calloc(pages, sizeof *versions);
    if (memory == MAP_FAILED || !versions || mlock(versions, pages * sizeof *versions)) return perror("workload"), 2;
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE); /* pages are counted one by one */
    for (uint64_t i = 0; i < pages; i++) fill((uint64_t *)(memory + i * PAGE), i, 0);
    double filled = now();
    for (; now() - filled < seconds; visits++) {
        dice = dice * 6364136223846793005ull + 1442695040888963407ull;
        uint64_t i = (dice >> 20) % pages;
        uint64_t *page = (uint64_t *)(memory + i * PAGE);
        verify(page, i, versions[i], pages);
        if (visits % 2 && versions[i] < UINT16_MAX) fill(page, i, ++versions[i]);
    }
    for (uint64_t i = 0; i < pages; i++) verify((uint64_t *)(memory + i * PAGE), i, versions[i], pages);
    printf("pages=%llu visits=%llu verified=%llu", (unsigned long long)pages, (unsigned long long)visits,
           (unsigned long long)(visits + pages));
    for (int kind = 0; kind < KINDS; kind++) printf(" %s=%llu", names[kind], (unsigned long long)counts[kind]);
    printf(" fill_ms=%.0f total_ms=%.0f\n", (filled - begin) * 1e3, (now() - begin) * 1e3);
    return counts[RIGHT] != visits + pages;
}
