/* C code that fails, or keeps state in statics, for the suites in tests/tests. */

#include <alloca.h>
#include <assert.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Overflows the stack by recursion. */
uint64_t helper_recurse(uint64_t depth)
{
    volatile uint64_t frame[16];
    frame[3] = depth;
    return helper_recurse(depth + 1) + frame[3];
}

/* Allocates an array on the stack; overflows the stack at once if it is too large. */
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

/* Fails an assertion unless the value is 42. */
void helper_assert(int value)
{
    assert(value == 42);
}

static jmp_buf place;

/* Calls a function. Returns 1 if helper_jump jumps back here. */
int helper_with_place(void (*function)(void *), void *argument)
{
    if (setjmp(place) != 0)
        return 1;
    function(argument);
    return 0;
}

/* Jumps back to helper_with_place. */
void helper_jump(void)
{
    longjmp(place, 1);
}

/* Jumps within its own frame. Returns 7. */
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

/* Returns an entry of a static table. The first call fills the table. */
uint32_t helper_table(uint8_t index)
{
    if (table[1] == 0)
        for (uint32_t entry = 0; entry < 256; entry++)
            table[entry] = entry * 2654435761u;
    return table[index];
}

static uint64_t calls = 0x1000;

/* Counts its calls in a static. Returns the count. */
uint64_t helper_count(void)
{
    return ++calls;
}

/* Calls `visit` with every number below a limit. Returns the sum of the results. */
uint64_t helper_walk(uint64_t limit, uint64_t (*visit)(uint64_t number, void *data), void *data)
{
    uint64_t sum = 0;
    for (uint64_t number = 0; number < limit; number++)
        sum += visit(number, data);
    return sum;
}

/* Stores a function pointer on the calling code's heap. */
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

/* Statics that tests write. */
uint64_t helper_data = 0x0123456789abcdef;
uint64_t helper_bss;

/* Starts a child with vfork, which exits at once. Returns its wait status. */
int helper_vfork(int status)
{
    int result = -1;
    pid_t child = vfork();
    if (child == 0)
        _exit(status);
    waitpid(child, &result, 0);
    return result;
}

/* As above, with the status that a function returns in the child. */
int helper_vfork_and(int (*function)(void))
{
    int result = -1;
    pid_t child = vfork();
    if (child == 0)
        _exit(function());
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

/* Cancels a thread that blocks in read. Returns how many of its cleanup functions have run. */
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
