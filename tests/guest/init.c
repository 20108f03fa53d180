/* PID 1 of the guest: carries out /plan line by line, reports each step on the second serial port, powers off.
 *
 * The first port is the kernel's own console, so that neither garbles the other. A report is one line each:
 *     begin SECONDS STEP        the step as it stands in the plan, with the guest's uptime
 *     text LINE                 what the step shows or its program printed
 *     end SECONDS CODE          0, an exit status, 128 + signal, or errno of a step without a program
 * A program that fails does not end the plan: what follows (the counters, swapoff) is wanted then above all. Any other
 * step that fails does.
 *
 *     insmod NAME               a module of the initramfs, in the order of its dependencies
 *     write PATH TEXT           as the shell's echo TEXT > PATH
 *     address INTERFACE IPV4    up, in a network of 24 bits
 *     host TAG                  the host's files by 9p, read-only; programs run there from now on
 *     mkswap DEVICE             an empty swap area over all of it
 *     swapon DEVICE             with discards, as ramster does
 *     swapoff DEVICE
 *     wait PATH SECONDS         until the file is there, the host's /run if `host` came before
 *     show PATH [WORD]...       the lines of a file that begin with one of the words, or all
 *     run PROGRAM [WORD]...     in the foreground
 *     start PROGRAM [WORD]...   in the background; it is ended before the machine goes off
 *     stop                      what was started gets SIGTERM, in reverse order, and is waited for
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS_MAX 48     /* of a step; the longest here has 20 */
#define LINE_MAX_ 2048
#define STARTED_MAX 8
#define DEVICE_WAIT_MS 10000 /* a virtio disk or network card appears within 100 ms of its module */
#define STOP_WAIT_MS 30000
#define HOST "/host"

static FILE *report;
static char root[16]; /* "" or HOST */
static pid_t started[STARTED_MAX];
static int running;

static double uptime(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static void pause_ms(int ms) {
    struct timespec span = {ms / 1000, ms % 1000 * 1000000L};
    nanosleep(&span, NULL);
}

static int result(long returned) { return returned < 0 ? errno : 0; }

static int insmod(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/modules/%s.ko", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno;
    int code = result(syscall(SYS_finit_module, fd, "", 0));
    close(fd);
    return code == EEXIST ? 0 : code;
}

static int write_text(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return errno;
    int code = result(write(fd, text, strlen(text)));
    close(fd);
    return code;
}

static int address(const char *interface, const char *ipv4) {
    struct ifreq request = {0};
    struct sockaddr_in *where = (struct sockaddr_in *)&request.ifr_addr;
    char path[64];
    snprintf(path, sizeof path, "/sys/class/net/%s", interface);
    for (int ms = 0; access(path, F_OK) && ms < DEVICE_WAIT_MS; ms += 10) pause_ms(10);
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sock < 0) return errno;
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", interface);
    where->sin_family = AF_INET;
    int code = inet_aton(ipv4, &where->sin_addr) ? result(ioctl(sock, SIOCSIFADDR, &request)) : EINVAL;
    if (!code) {
        inet_aton("255.255.255.0", &where->sin_addr);
        code = result(ioctl(sock, SIOCSIFNETMASK, &request));
    }
    if (!code) {
        request.ifr_flags = IFF_UP | IFF_RUNNING;
        code = result(ioctl(sock, SIOCSIFFLAGS, &request));
    }
    close(sock);
    return code;
}

static int host(const char *tag) {
    static const char *const shared[] = {"/dev", "/proc", "/sys"};
    /* What programs write to; the rest of the host's files stays as it is. */
    static const char *const own[] = {"/run", "/var/tmp", "/dev/shm"};
    char path[64];
    mkdir(HOST, 0755);
    if (mount(tag, HOST, "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,msize=262144,cache=loose")) return errno;
    for (size_t i = 0; i < sizeof shared / sizeof *shared; i++) {
        snprintf(path, sizeof path, HOST "%s", shared[i]);
        if (mount(shared[i], path, NULL, MS_BIND | MS_REC, NULL)) return errno;
    }
    mkdir("/dev/shm", 01777);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        snprintf(path, sizeof path, HOST "%s", own[i]);
        if (mount("tmpfs", path, "tmpfs", 0, "mode=1777")) return errno;
    }
    strcpy(root, HOST);
    return 0;
}

static int make_swap(const char *device) {
    static uint32_t header[PAGE / 4];
    uint64_t bytes = 0;
    int fd = -1;
    for (int ms = 0; (fd = open(device, O_RDWR | O_CLOEXEC)) < 0 && ms < DEVICE_WAIT_MS; ms += 10) pause_ms(10);
    if (fd < 0) return errno;
    for (int ms = 0; (ioctl(fd, BLKGETSIZE64, &bytes) || !bytes) && ms < DEVICE_WAIT_MS; ms += 10) pause_ms(10);
    header[256] = 1; /* version */
    header[257] = (uint32_t)(bytes / PAGE - 1);
    memcpy((char *)header + PAGE - 10, "SWAPSPACE2", 10);
    int code = bytes < 10 * PAGE ? EINVAL : pwrite(fd, header, PAGE, 0) != PAGE ? EIO : result(fsync(fd));
    close(fd);
    return code;
}

static int wait_for(const char *path, const char *seconds) {
    char full[256];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (long ms = atol(seconds) * 1000; access(full, F_OK); ms -= 20) {
        if (ms <= 0) return ETIMEDOUT;
        pause_ms(20);
    }
    return 0;
}

static void say(const char *line) { fprintf(report, "text %s\n", line); }

static int show(char **words) {
    char line[LINE_MAX_];
    FILE *file = fopen(words[0], "re");
    if (!file) return errno;
    while (fgets(line, sizeof line, file)) {
        int wanted = !words[1];
        line[strcspn(line, "\n")] = 0;
        for (int i = 1; words[i]; i++) {
            size_t length = strlen(words[i]);
            wanted |= !strncmp(line, words[i], length) && strchr(" :", line[length]);
        }
        if (wanted) say(line);
    }
    fclose(file);
    return 0;
}

/* Its two outputs go to *output, as text lines of the report or, in the background, to the console. */
static pid_t spawn(char **words, int output) {
    static char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/run",
                                  "TMPDIR=/run", "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1", "TERM=dumb", NULL};
    fflush(report);
    pid_t child = fork();
    if (child) return child;
    if (*root && (chroot(root) || chdir("/"))) _exit(126);
    int nothing = open("/dev/null", O_RDONLY);
    dup2(nothing, 0);
    dup2(output, 1);
    dup2(output, 2);
    environ = environment;
    execvp(words[0], words);
    dprintf(2, "%s: %s\n", words[0], strerror(errno));
    _exit(127);
}

static int status_of(pid_t child) {
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) return errno;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static int run(char **words) {
    char line[LINE_MAX_];
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) return errno;
    pid_t child = spawn(words, ends[1]);
    close(ends[1]);
    if (child < 0) return errno;
    FILE *output = fdopen(ends[0], "r");
    while (fgets(line, sizeof line, output)) {
        line[strcspn(line, "\r\n")] = 0;
        say(line);
    }
    fclose(output);
    return status_of(child);
}

static int start(char **words) {
    if (running == STARTED_MAX) return ENOSPC;
    pid_t child = spawn(words, STDOUT_FILENO);
    if (child < 0) return errno;
    started[running++] = child;
    return 0;
}

/* 0, or what the last one of those that failed ended with; SIGKILL after STOP_WAIT_MS. */
static int stop(void) {
    int code = 0;
    while (running) {
        pid_t child = started[--running];
        int status = 0, ms = 0;
        kill(child, SIGTERM);
        for (; waitpid(child, &status, WNOHANG) == 0 && ms < STOP_WAIT_MS; ms += 10) pause_ms(10);
        if (ms >= STOP_WAIT_MS) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        }
        if (status) code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    }
    return code;
}

static int has_program;

static int step(char **words, int count) {
    const char *name = words[0];
    has_program = !strcmp(name, "run") || !strcmp(name, "stop");
    if (!strcmp(name, "insmod") && count == 2) return insmod(words[1]);
    if (!strcmp(name, "write") && count == 3) return write_text(words[1], words[2]);
    if (!strcmp(name, "address") && count == 3) return address(words[1], words[2]);
    if (!strcmp(name, "host") && count == 2) return host(words[1]);
    if (!strcmp(name, "mkswap") && count == 2) return make_swap(words[1]);
    if (!strcmp(name, "swapon") && count == 2) return result(swapon(words[1], SWAP_FLAG_DISCARD));
    if (!strcmp(name, "swapoff") && count == 2) return result(swapoff(words[1]));
    if (!strcmp(name, "wait") && count == 3) return wait_for(words[1], words[2]);
    if (!strcmp(name, "show") && count >= 2) return show(words + 1);
    if (!strcmp(name, "run") && count >= 2) return run(words + 1);
    if (!strcmp(name, "start") && count >= 2) return start(words + 1);
    if (!strcmp(name, "stop") && count == 1) return stop();
    return EINVAL;
}

static void follow(FILE *plan) {
    char line[LINE_MAX_];
    while (fgets(line, sizeof line, plan)) {
        char *words[WORDS_MAX + 1];
        int count = 0;
        line[strcspn(line, "\n")] = 0;
        fprintf(report, "begin %.2f %s\n", uptime(), line);
        for (char *word = strtok(line, " "); word && count < WORDS_MAX; word = strtok(NULL, " ")) words[count++] = word;
        words[count] = NULL;
        int code = count ? step(words, count) : EINVAL;
        fprintf(report, "end %.2f %d\n", uptime(), code);
        if (code && !has_program) break;
    }
}

int main(void) {
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++) dup2(console, fd);
    /* A PID 1 whose own pages are on the swap device that it takes down would wait for itself. */
    mlockall(MCL_CURRENT | MCL_FUTURE);
    report = fopen("/dev/ttyS1", "we");
    FILE *plan = fopen("/plan", "re");
    if (report && plan) {
        setvbuf(report, NULL, _IOLBF, 0);
        follow(plan);
        stop();
        fflush(report);
        fsync(fileno(report));
    }
    sync();
    reboot(RB_POWER_OFF);
    for (;;) pause();
}
