/* C code that goes wrong, or keeps state in statics, for the suites in tests/tests. */

#include <alloca.h>
#include <assert.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Runs out of the stack in C frames. */
uint64_t helper_recurse(uint64_t depth)
{
    volatile uint64_t frame[16];
    frame[3] = depth;
    return helper_recurse(depth + 1) + frame[3];
}

/* Takes more of the stack than there is, in one step. */
uint64_t helper_take_stack(size_t size)
{
    volatile uint8_t *room = alloca(size);
    room[0] = 1;
    return room[0];
}

/* Writes past the end of an array on the stack. */
uint64_t helper_smash(size_t size)
{
    uint8_t array[16];
    volatile uint8_t *byte = array;
    for (size_t index = 0; index < size; index++)
        byte[index] = 0x5a;
    return array[3];
}

/* Asserts what is not so. */
void helper_assert(int value)
{
    assert(value == 42);
}

static jmp_buf place;

/* Calls a function; returns 1 if it comes back by a jump. */
int helper_with_place(void (*function)(void *), void *argument)
{
    if (setjmp(place) != 0)
        return 1;
    function(argument);
    return 0;
}

/* Jumps to where helper_with_place was called. */
void helper_jump(void)
{
    longjmp(place, 1);
}

/* Jumps within its own frames; returns 7. */
int helper_jump_inside(void)
{
    jmp_buf inside;
    volatile int value = 3;
    if (setjmp(inside) == 0) {
        value = 7;
        longjmp(inside, 1);
    }
    return value;
}

static uint32_t table[256];

/* Fills a table in a static at its first call. */
uint32_t helper_table(uint8_t index)
{
    if (table[1] == 0)
        for (uint32_t entry = 0; entry < 256; entry++)
            table[entry] = entry * 2654435761u;
    return table[index];
}

static uint64_t calls = 0x1000;

/* Counts its calls in a static. */
uint64_t helper_count(void)
{
    return ++calls;
}

/* Calls back with every number below a limit; returns the sum of the answers. */
uint64_t helper_walk(uint64_t limit, uint64_t (*visit)(uint64_t number, void *data), void *data)
{
    uint64_t sum = 0;
    for (uint64_t number = 0; number < limit; number++)
        sum += visit(number, data);
    return sum;
}

/* A function pointer kept on the heap of whoever calls. */
void *helper_keep(void *function)
{
    void **place = malloc(sizeof *place);
    *place = function;
    return place;
}

uint64_t helper_call_kept(void *place, uint64_t argument)
{
    uint64_t (*function)(uint64_t) = *(uint64_t (**)(uint64_t))place;
    return function(argument);
}

/* Statics to be written at. */
uint64_t helper_data = 0x0123456789abcdef;
uint64_t helper_bss;

/* Starts a child that shares this process's memory and exits at once; returns its wait status. */
int helper_vfork(int status)
{
    int result = -1;
    pid_t child = vfork();
    if (child == 0)
        _exit(status);
    waitpid(child, &result, 0);
    return result;
}

static int cleaned;

static void clean(int *unused)
{
    (void)unused;
    cleaned++;
}

static void *read_for_ever(void *descriptor)
{
    __attribute__((cleanup(clean))) int guard = 0;
    char byte;
    while (read(*(int *)descriptor, &byte, 1) >= 0)
        guard++;
    return 0;
}

/* Cancels a thread that reads from a pipe to which nobody writes; returns how many of its variables were cleaned up. */
int helper_cancel(void)
{
    int ends[2];
    pthread_t thread;
    if (pipe(ends) || pthread_create(&thread, 0, read_for_ever, &ends[0]))
        return -1;
    usleep(100000);
    if (pthread_cancel(thread) || pthread_join(thread, 0))
        return -1;
    return cleaned;
}
