//! Domains: what code in them may do, which violations are contained, and what remains after one.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use core::arch::naked_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use kernel_demo::domain::{Domain, Error, Kernel, heap_at};
use kernel_demo::memory;
use kernel_demo::testing::with_each_fence;
use kernel_demo::trap::{Cause, Trap};
use pkru::allocator::KeyError;
use pkru::domain::{Entry, Failure, Sizes, State};
use pkru::fault::PageFault;
use pkru::rights::Access;

kernel_demo::test_suite!(
    a_call_returns_its_value,
    memory_persists_from_call_to_call,
    a_write_into_another_domain_is_contained,
    a_read_of_another_domain_is_contained,
    a_write_into_the_kernel_is_contained,
    a_write_into_page_tables_is_contained,
    a_read_of_the_kernel_is_allowed,
    stack_overflow_ends_at_the_guard_page,
    a_null_write_is_contained,
    an_invalid_instruction_is_contained,
    a_division_by_zero_is_contained,
    a_general_protection_fault_is_contained,
    a_bad_stack_pointer_is_contained,
    a_panic_is_contained,
    a_discard_clears_the_memory,
    the_callers_registers_are_preserved,
    an_exhausted_heap_returns_none,
    a_fifteenth_domain_is_refused,
    bad_sizes_are_refused,
    a_domain_larger_than_memory_is_refused,
    two_hundred_domains_leak_nothing,
    a_thousand_rewinds,
);

const SIZES: Sizes = Sizes { stack: 16 * 1024, heap: 16 * 1024 };

static KERNEL_DATA: AtomicU64 = AtomicU64::new(1);

fn new() -> Domain {
    Domain::new(Kernel, SIZES).unwrap_or_else(|error| panic!("cannot create a domain: {error:?}"))
}

fn call(domain: &mut Domain, entry: Entry, argument: u64) -> Result<u64, Trap> {
    // SAFETY: the entry points write only the domain's memory and what the domain may not write, which traps.
    unsafe { domain.enter(&(), entry, argument) }.map_err(|failure| match failure {
        Failure::Trap(trap) => trap,
        Failure::NotReady(error) => panic!("cannot prepare the domain: {error:?}"),
    })
}

/// Makes a call that must trap, and checks that the next call works.
fn contain(domain: &mut Domain, entry: Entry, argument: u64) -> Cause {
    let trap = call(domain, entry, argument).expect_err("the call must trap");
    assert_eq!(domain.state(), State::Violated);
    assert_eq!(call(domain, double, 21).expect("the next call works"), 42);
    trap.cause
}

fn key_fault(cause: Cause) -> pkru::fault::KeyFault {
    match cause {
        Cause::PageFault(PageFault::Key(fault)) => fault,
        other => panic!("not a key fault: {other:?}"),
    }
}

unsafe extern "C" fn double(value: u64) -> u64 {
    value * 2
}

unsafe extern "C" fn write(address: u64) -> u64 {
    // SAFETY: in a domain this is the violation: the write traps, so it changes nothing. The control passes an atomic.
    unsafe { (address as *mut u64).write_volatile(0xbad) };
    0
}

unsafe extern "C" fn read(address: u64) -> u64 {
    // SAFETY: a read that the domain may not make traps. All others are of mapped integers.
    unsafe { (address as *const u64).read_volatile() }
}

unsafe extern "C" fn add_to(address: u64) -> u64 {
    // SAFETY: the address is in memory of the domain that nothing else uses.
    let before = unsafe { (address as *const u64).read_volatile() };
    // SAFETY: as above.
    unsafe { (address as *mut u64).write_volatile(before + 1) };
    before
}

fn a_call_returns_its_value() {
    with_each_fence(|| assert_eq!(call(&mut new(), double, 4).unwrap(), 8));
}

fn memory_persists_from_call_to_call() {
    with_each_fence(|| {
        let mut domain = new();
        let address = domain.memory().heap().end.as_u64() - 8;
        let seen: [u64; 3] = core::array::from_fn(|_| call(&mut domain, add_to, address).unwrap());
        assert_eq!(seen, [0, 1, 2]);
    });
}

fn a_write_into_another_domain_is_contained() {
    with_each_fence(|| {
        let (mut one, mut other) = (new(), new());
        for address in [other.memory().heap().end.as_u64() - 8, other.memory().stack().start.as_u64()] {
            assert_eq!(call(&mut other, add_to, address).unwrap(), 0, "control: the owner writes there");
            let fault = key_fault(contain(&mut one, write, address));
            assert_eq!((fault.address, fault.key, fault.access), (address, other.memory().key(), Access::Write));
            assert_eq!(call(&mut other, read, address).unwrap(), 1, "the other domain's memory is unchanged");
        }
    });
}

fn a_read_of_another_domain_is_contained() {
    with_each_fence(|| {
        let (mut one, other) = (new(), new());
        let address = other.memory().heap().end.as_u64() - 8;
        let fault = key_fault(contain(&mut one, read, address));
        assert_eq!((fault.key, fault.access), (other.memory().key(), Access::Read));
    });
}

fn a_write_into_the_kernel_is_contained() {
    with_each_fence(|| {
        let address = KERNEL_DATA.as_ptr() as u64;
        let fault = key_fault(contain(&mut new(), write, address));
        assert_eq!((fault.address, fault.key.number()), (address, 0));
        assert_eq!(KERNEL_DATA.load(Ordering::Relaxed), 1);
        // SAFETY: the control: the address is that of an atomic, and nothing else accesses it.
        unsafe { write(address) };
        assert_eq!(KERNEL_DATA.swap(1, Ordering::Relaxed), 0xbad);
    });
}

fn a_write_into_page_tables_is_contained() {
    use x86_64::registers::control::Cr3;
    with_each_fence(|| {
        // The last entry of the top-level table, which maps nothing.
        let entry = Cr3::read().0.start_address().as_u64() + 511 * 8;
        assert_eq!(key_fault(contain(&mut new(), write, entry)).key.number(), 0);
    });
}

fn a_read_of_the_kernel_is_allowed() {
    with_each_fence(|| assert_eq!(call(&mut new(), read, KERNEL_DATA.as_ptr() as u64).unwrap(), 1));
}

#[allow(unconditional_recursion, reason = "the stack must overflow")]
unsafe extern "C" fn recurse(depth: u64) -> u64 {
    let frame = [depth; 64];
    // SAFETY: this is the violation. The overflow traps at the guard page.
    core::hint::black_box(&frame)[7] + unsafe { recurse(depth + 1) }
}

fn stack_overflow_ends_at_the_guard_page() {
    with_each_fence(|| {
        let mut domain = new();
        let guard = domain.memory().stack().start.as_u64() - 4096..domain.memory().stack().start.as_u64();
        let cause = contain(&mut domain, recurse, 0);
        let Cause::PageFault(PageFault::NotPresent { address, access: Access::Write }) = cause else {
            panic!("{cause:?}")
        };
        assert!(guard.contains(&address), "{address:#x} is in the guard page {guard:x?}");
    });
}

fn a_null_write_is_contained() {
    with_each_fence(|| {
        let expected = PageFault::NotPresent { address: 0, access: Access::Write };
        assert_eq!(contain(&mut new(), write_null, 0), Cause::PageFault(expected));
    });
}

#[unsafe(naked)]
unsafe extern "C" fn write_null(_: u64) -> u64 {
    naked_asm!("xor eax, eax", "mov [rax], rax", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn invalid(_: u64) -> u64 {
    naked_asm!("ud2")
}

fn an_invalid_instruction_is_contained() {
    with_each_fence(|| assert_eq!(contain(&mut new(), invalid, 0), Cause::Exception(6)));
}

#[unsafe(naked)]
unsafe extern "C" fn divide_by_zero(_: u64) -> u64 {
    naked_asm!("xor ecx, ecx", "div ecx", "ret")
}

fn a_division_by_zero_is_contained() {
    with_each_fence(|| assert_eq!(contain(&mut new(), divide_by_zero, 0), Cause::Exception(0)));
}

#[unsafe(naked)]
unsafe extern "C" fn noncanonical(_: u64) -> u64 {
    naked_asm!("mov rax, 0x8000000000000000", "mov rax, [rax]", "ret")
}

fn a_general_protection_fault_is_contained() {
    with_each_fence(|| assert_eq!(contain(&mut new(), noncanonical, 0), Cause::Exception(13)));
}

#[unsafe(naked)]
unsafe extern "C" fn lose_the_stack(_: u64) -> u64 {
    naked_asm!("mov rsp, 8", "push rax", "ret")
}

fn a_bad_stack_pointer_is_contained() {
    with_each_fence(|| assert!(matches!(contain(&mut new(), lose_the_stack, 0), Cause::PageFault(_))));
}

unsafe extern "C" fn panic(value: u64) -> u64 {
    assert_eq!(value, 1, "this is the violation");
    0
}

fn a_panic_is_contained() {
    with_each_fence(|| {
        assert_eq!(call(&mut new(), panic, 1), Ok(0), "control: without the violation it returns");
        assert_eq!(contain(&mut new(), panic, 0), Cause::Exception(6));
    });
}

fn a_discard_clears_the_memory() {
    with_each_fence(|| {
        let mut domain = new();
        let heap_end = domain.memory().heap().end.as_u64() - 8;
        let stack = domain.memory().stack().start.as_u64();
        for address in [heap_end, stack] {
            assert_eq!(call(&mut domain, add_to, address).unwrap(), 0);
        }
        contain(&mut domain, invalid, 0);
        for address in [heap_end, stack] {
            assert_eq!(call(&mut domain, read, address).unwrap(), 0);
        }
    });
}

/// Overwrites the callee-saved registers, MXCSR and the x87 control word, sets DF, AC and NT, and returns.
#[unsafe(naked)]
unsafe extern "C" fn clobber(_: u64) -> u64 {
    naked_asm!(
        "mov rbx, -1",
        "mov rbp, -1",
        "mov r12, -1",
        "mov r13, -1",
        "mov r14, -1",
        "mov r15, -1",
        "fldz",
        "push 0x7fff",
        "ldmxcsr [rsp]",
        "fldcw [rsp]",
        "pop rax",
        "std",
        "pushfq",
        "or dword ptr [rsp], 0x44000",
        "popfq",
        "ret",
    )
}

/// Calls `function(argument)` and returns 0 if it preserved the callee-saved registers, MXCSR, the x87 control word and
/// the flags AC, NT and DF.
#[unsafe(naked)]
unsafe extern "C" fn changes(function: extern "C" fn(u64), argument: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 24",
        "stmxcsr [rsp]",
        "fnstcw [rsp + 4]",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov ebx, 1",
        "mov ebp, 2",
        "mov r12d, 3",
        "mov r13d, 4",
        "mov r14d, 5",
        "mov r15d, 6",
        "call rax",
        "xor eax, eax",
        "sub rbx, 1",
        "or rax, rbx",
        "sub rbp, 2",
        "or rax, rbp",
        "sub r12, 3",
        "or rax, r12",
        "sub r13, 4",
        "or rax, r13",
        "sub r14, 5",
        "or rax, r14",
        "sub r15, 6",
        "or rax, r15",
        "stmxcsr [rsp + 8]",
        "fnstcw [rsp + 12]",
        "mov ecx, [rsp]",
        "xor ecx, [rsp + 8]",
        "or rax, rcx",
        "movzx ecx, word ptr [rsp + 4]",
        "xor cx, [rsp + 12]",
        "or rax, rcx",
        "pushfq",
        "pop rcx",
        "and ecx, 0x44400",
        "or rax, rcx",
        "cld",
        "add rsp, 24",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

fn the_callers_registers_are_preserved() {
    extern "C" fn in_domain(domain: u64) {
        // SAFETY: the argument is the address of a domain that nothing else uses meanwhile.
        let domain = unsafe { &mut *(domain as *mut Domain) };
        let _ = call(domain, clobber, 0);
    }
    extern "C" fn in_domain_then_trap(domain: u64) {
        // SAFETY: as above.
        let domain = unsafe { &mut *(domain as *mut Domain) };
        let _ = call(domain, clobber_and_trap, 0);
    }
    with_each_fence(|| {
        let mut domain = new();
        let address = &raw mut domain as u64;
        // SAFETY: the gate preserves the registers, so the function has the C calling convention.
        assert_eq!(unsafe { changes(in_domain, address) }, 0);
        // SAFETY: as above.
        assert_eq!(unsafe { changes(in_domain_then_trap, address) }, 0);
    });
    extern "C" fn outside(_: u64) {
        // SAFETY: the function sets DF, which `changes` clears before any Rust code runs.
        unsafe { set_direction() };
    }
    // SAFETY: `outside` only sets DF, which `changes` clears.
    assert_ne!(unsafe { changes(outside, 0) }, 0, "control: outside a domain the change is found");
}

#[unsafe(naked)]
unsafe extern "C" fn set_direction() {
    naked_asm!("std", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn clobber_and_trap(_: u64) -> u64 {
    naked_asm!("call {clobber}", "ud2", clobber = sym clobber)
}

unsafe extern "C" fn allocate_until_none(heap: u64) -> u64 {
    // SAFETY: the argument is the start of the calling domain's heap, and this is the only reference.
    let heap = unsafe { heap_at(heap) };
    (0..).take_while(|_| heap.allocate(1000, 16, 0).is_ok_and(|block| block.is_some())).count() as u64
}

fn an_exhausted_heap_returns_none() {
    with_each_fence(|| {
        let mut domain = new();
        let heap = domain.memory().heap().start.as_u64();
        let blocks = call(&mut domain, allocate_until_none, heap).unwrap();
        assert!((8..16).contains(&blocks), "{blocks} blocks of 1000 bytes fit into 16 KiB");
    });
}

fn a_fifteenth_domain_is_refused() {
    with_each_fence(|| {
        // Key 0 is the kernel's, and key 1 the trap stacks'.
        let domains: [Domain; 14] = core::array::from_fn(|_| new());
        match Domain::new(Kernel, SIZES) {
            Err(Error::Key(KeyError::Exhausted { limit: 14 })) => {}
            other => panic!("{other:?}"),
        }
        drop(domains);
        new();
    });
}

fn bad_sizes_are_refused() {
    for (stack, heap) in [(0, 4096), (4096, 0), (4095, 4096), (4096, 5000), (usize::MAX & !4095, 4096)] {
        let result = Domain::new(Kernel, Sizes { stack, heap });
        assert!(matches!(result, Err(Error::Size(_))), "{result:?}");
    }
}

fn a_domain_larger_than_memory_is_refused() {
    let before = memory::free_frames();
    let result = Domain::new(Kernel, Sizes { stack: 4096, heap: 3 << 30 });
    assert!(matches!(result, Err(Error::Map(_))), "{result:?}");
    // The page tables of the part that was mapped stay.
    assert!(before - memory::free_frames() < 1024);
    new();
}

fn two_hundred_domains_leak_nothing() {
    with_each_fence(|| {
        let create_and_violate = || {
            let mut domain = new();
            contain(&mut domain, invalid, 0);
        };
        create_and_violate();
        let before = memory::free_frames();
        for _ in 0..200 {
            create_and_violate();
        }
        // No address is used twice, so the page tables grow: by one frame for each 2 MiB of addresses.
        let tables = 200 * (SIZES.stack + SIZES.heap + 3 * 4096) / (2 << 20) + 1;
        assert!(before - memory::free_frames() <= tables);
    });
}

fn a_thousand_rewinds() {
    with_each_fence(|| {
        let mut domain = new();
        let address = KERNEL_DATA.as_ptr() as u64;
        for _ in 0..1000 {
            key_fault(call(&mut domain, write, address).unwrap_err().cause);
        }
    });
}
