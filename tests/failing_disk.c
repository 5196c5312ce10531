/* Preloaded into a process: fails one write or flush of a regular file, or loses the power there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FAIL_ONCE, FAIL_FROM_THERE, LOSE_POWER };
enum { MOST = 4096 };

/* What a write replaced, until its file is flushed: a loss of power may bring it back. */
static struct undo { dev_t dev; ino_t ino; off_t at, size; size_t length; char *old; int fd; } log_[MOST];
static int num_logged, mode;
static long count, moment = -1;

long num_calls(void) { return count; }
void arm(long at, int how) { count = 0; num_logged = 0; moment = at; mode = how; }

static int is_file(int fd, struct stat *found) {
  return moment >= 0 && !fstat(fd, found) && (S_ISREG(found->st_mode) || S_ISDIR(found->st_mode));
}

static void lose_power(void) {
  moment = -1;
  while (num_logged--) {
    struct undo *last = &log_[num_logged];
    if (pwrite(last->fd, last->old, last->length, last->at) < 0 || ftruncate(last->fd, last->size)) abort();
  }
  kill(getpid(), SIGKILL);
}

/* Whether this call is to fail. */
static int fails(int fd) {
  struct stat found;
  if (!is_file(fd, &found)) return 0;
  long now = count++;
  if (mode == LOSE_POWER && now == moment) lose_power();
  if (mode == FAIL_ONCE ? now == moment : mode == FAIL_FROM_THERE && now >= moment) { errno = EIO; return 1; }
  return 0;
}

static void note(int fd, off_t at, size_t length) {
  struct stat found;
  if (mode != LOSE_POWER || !is_file(fd, &found) || !S_ISREG(found.st_mode)) return;
  if (num_logged == MOST) abort();
  struct undo *new = &log_[num_logged++];
  *new = (struct undo){found.st_dev, found.st_ino, at, found.st_size, 0, malloc(length + 1), dup(fd)};
  ssize_t there = pread(fd, new->old, length, at);
  new->length = there > 0 ? there : 0;
}

static void flushed(int fd) {
  struct stat found;
  if (mode != LOSE_POWER || !is_file(fd, &found)) return;
  int kept = 0;
  for (int i = 0; i < num_logged; i++) {
    if (log_[i].ino == found.st_ino && log_[i].dev == found.st_dev) { free(log_[i].old); close(log_[i].fd); }
    else log_[kept++] = log_[i];
  }
  num_logged = kept;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *from, size_t length) {
  REAL(write);
  if (fails(fd)) return -1;
  note(fd, lseek(fd, 0, SEEK_CUR), length);
  return real(fd, from, length);
}
ssize_t pwrite64(int fd, const void *from, size_t length, off64_t at) {
  REAL(pwrite64);
  if (fails(fd)) return -1;
  note(fd, at, length);
  return real(fd, from, length, at);
}
ssize_t pwrite(int fd, const void *from, size_t length, off_t at) { return pwrite64(fd, from, length, at); }
int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  struct stat found;
  if (fails(fd)) return -1;
  if (is_file(fd, &found) && size < found.st_size) note(fd, size, found.st_size - size);
  return real(fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int fsync(int fd) {
  REAL(fsync);
  if (fails(fd)) return -1;
  flushed(fd);
  return real(fd);
}
int fdatasync(int fd) {
  REAL(fdatasync);
  if (fails(fd)) return -1;
  flushed(fd);
  return real(fd);
}
