/* 64 threads in and out of system calls, which check what they share. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 64 };

static const char *status;
static char go[4096], next[4096];
static atomic_long rounds[THREADS];
static atomic_int stop;
static atomic_long wrong;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static long first, second;
static int pipes[THREADS][2];
static __thread long own;

static void say(const char *text)
{
    FILE *out = fopen(next, "w");
    fprintf(out, "%s\n", text);
    fclose(out);
    rename(next, status);
}

static void *work(void *argument)
{
    long number = (long)argument;
    double sum = 0;
    unsigned seed = number;
    pid_t tid = syscall(SYS_gettid);
    while (!atomic_load(&stop)) {
        long round = atomic_fetch_add(&rounds[number], 1);
        if (own++ != round)
            atomic_fetch_add(&wrong, 1);
        switch (rand_r(&seed) % 6) {
        case 0: {
            struct timespec time = {0, 1000000};
            while (nanosleep(&time, &time) && errno == EINTR)
                ;
            break;
        }
        case 1:
            pthread_mutex_lock(&mutex);
            first++;
            if (first - second != 1)
                atomic_fetch_add(&wrong, 1);
            second++;
            pthread_cond_broadcast(&turn);
            pthread_mutex_unlock(&mutex);
            break;
        case 2: {
            struct timespec time;
            clock_gettime(CLOCK_REALTIME, &time);
            time.tv_sec += 5;
            pthread_mutex_lock(&mutex);
            long seen = second;
            if (number % 8)
                pthread_cond_timedwait(&turn, &mutex, &time);
            if (second < seen)
                atomic_fetch_add(&wrong, 1);
            pthread_mutex_unlock(&mutex);
            break;
        }
        case 3: {
            long sent = round, got = -1;
            if (write(pipes[number][1], &sent, sizeof sent) != sizeof sent ||
                read(pipes[number][0], &got, sizeof got) != sizeof got || got != sent)
                atomic_fetch_add(&wrong, 1);
            break;
        }
        case 4: {
            struct pollfd wanted = {pipes[number][0], POLLIN, 0};
            int count = poll(&wanted, 1, 2);
            if (count != 0 && !(count < 0 && errno == EINTR))
                atomic_fetch_add(&wrong, 1);
            break;
        }
        default:
            sum = 0;
            for (int at = 1; at <= 10000; at++)
                sum += 1.0 / at;
            if (sum < 9.7876060 || sum > 9.7876061)
                atomic_fetch_add(&wrong, 1);
        }
        if (syscall(SYS_gettid) != tid)
            atomic_fetch_add(&wrong, 1);
    }
    return NULL;
}

static void nap(void)
{
    struct timespec time = {0, 2000000};
    nanosleep(&time, NULL);
}

/* Waits until every thread has done some more rounds. */
static int all_go_on(long more)
{
    long before[THREADS];
    for (int at = 0; at < THREADS; at++)
        before[at] = atomic_load(&rounds[at]);
    for (int patience = 0; patience < 10000; patience++) {
        int done = 0;
        for (int at = 0; at < THREADS; at++)
            done += atomic_load(&rounds[at]) >= before[at] + more;
        if (done == THREADS)
            return 1;
        nap();
    }
    return 0;
}

int main(int count, char **arguments)
{
    pthread_t threads[THREADS];
    (void)count;
    status = arguments[1];
    snprintf(go, sizeof go, "%s.go", status);
    snprintf(next, sizeof next, "%s.new", status);
    for (long at = 0; at < THREADS; at++) {
        if (pipe(pipes[at]) || pthread_create(&threads[at], NULL, work, (void *)at))
            return 1;
    }
    if (!all_go_on(5)) {
        say("failed: not every thread has begun");
        return 1;
    }
    say("ready");
    while (access(go, F_OK))
        nap();
    int went_on = all_go_on(5);
    atomic_store(&stop, 1);
    pthread_cond_broadcast(&turn);
    for (int at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
    if (!went_on)
        say("failed: a thread has stopped");
    else if (atomic_load(&wrong))
        say("failed: a thread has seen something wrong");
    else
        say("ok");
    return 0;
}
