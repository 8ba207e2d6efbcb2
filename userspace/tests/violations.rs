//! Every way to go wrong is a violation of its own kind, and the domain works afterwards.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

use std::arch::asm;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pkru_userspace::{Access, Domain, HeapError, ViolationKind};
use support::{NOWHERE, contain, domain, key_fault, mistake, suite};

suite! {
    a_key_fault_names_everything,
    a_closure_is_named,
    a_null_write,
    a_jump_to_nowhere,
    an_address_that_is_none,
    a_stack_overflow,
    a_lost_stack_pointer,
    an_illegal_instruction,
    a_division_by_zero,
    a_breakpoint,
    a_bus_error,
    a_panic,
    a_panic_with_a_hook_of_the_programs,
    a_panic_on_another_thread,
    an_abort,
    an_exit,
    an_exhausted_heap_in_rust,
    a_loop_that_does_not_end,
    a_wild_jump,
    a_signal_that_code_sends_itself,
    frees_of_what_is_no_block,
    a_spoiled_fs_base,
    a_jump_to_32_bit_code,
    a_stack_pointer_in_the_signal_stack,
    memory_made_executable_only,
    a_copy_of_the_process_made_in_a_domain_ends,
    a_return_with_another_domains_key,
    opening_the_key_of_a_running_domain,
    a_breakpoint_outside_any_domain_kills_the_process_as_before,
    spoiled_registers_are_restored,
    a_fault_outside_any_domain_kills_the_process_as_before,
    deadlines_that_have_passed_at_once,
    a_stack_pointer_near_the_end_of_addresses,
}

fn a_key_fault_names_everything() {
    let mut domain = domain("names");
    static TARGET: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    #[inline(never)]
    fn culprit(target: *mut u64) {
        // SAFETY: none: this is the mistake.
        unsafe { target.write_volatile(1) };
    }
    let violation = contain(&mut domain, || culprit(black_box(TARGET.as_ptr())));
    let fault = key_fault(&violation);
    assert_eq!((fault.key.number(), fault.access, fault.address), (0, Access::Write, TARGET.as_ptr() as u64));
    assert!(!fault.rights.get(fault.key).allow(Access::Write));
    let symbol = violation.symbol().expect("the test has a symbol table");
    assert!(symbol.name().unwrap().ends_with("culprit"), "{symbol}");
    assert!(violation.target().unwrap().name().unwrap().ends_with("TARGET"), "{violation}");
    let text = violation.to_string();
    for part in ["`names`", "write of", "key 0", "culprit", "TARGET"] {
        assert!(text.contains(part), "{text}");
    }
}

fn a_closure_is_named() {
    let target = Box::into_raw(Box::new(0u64));
    // SAFETY: none: this is the mistake.
    let write = || unsafe { target.write_volatile(1) };
    let limited = Domain::builder("limited").deadline(Duration::from_secs(60));
    for mut domain in [domain("plain"), support::build(limited)] {
        let violation = domain.call(write).unwrap_err();
        let symbol = violation.symbol().expect("the test has a symbol table");
        assert!(symbol.name().unwrap().contains("a_closure_is_named"), "{symbol}");
        let text = violation.to_string();
        assert!(
            text.contains("): the program's memory, at") && text.contains("or use a `Region` or a callback"),
            "{text}"
        );
        // SAFETY: the call is made in the domain.
        let violation = domain.call(|| unsafe { libc::srand(1) }).unwrap_err();
        let text = violation.to_string();
        assert!(text.ends_with("nothing is wrong: open all statics to it (Globals::Writable)"), "{text}");
        let text = domain.call(|| drop(std::thread::current())).unwrap_err().to_string();
        assert!(!text.contains("warm_up"), "{text}");
    }
}

fn a_null_write() {
    let mut domain = domain("null");
    let violation = contain(&mut domain, mistake);
    assert_eq!(*violation.kind(), ViolationKind::Null { address: NOWHERE as u64, access: Access::Write });
}

fn a_jump_to_nowhere() {
    let mut domain = domain("jump");
    // SAFETY: none: this is the mistake.
    let function = unsafe { std::mem::transmute::<usize, extern "C" fn()>(black_box(0x10)) };
    let violation = contain(&mut domain, || function());
    assert_eq!(*violation.kind(), ViolationKind::Null { address: 0x10, access: Access::Execute });
}

fn an_address_that_is_none() {
    let mut domain = domain("canonical");
    // SAFETY: none: this is the mistake.
    let violation = contain(&mut domain, || unsafe { black_box((1u64 << 63) as *mut u64).write_volatile(1) });
    assert_eq!(*violation.kind(), ViolationKind::GeneralProtection);
}

fn a_stack_overflow() {
    #[allow(unconditional_recursion, reason = "overflowing the stack is the point")]
    fn recurse(depth: u64) -> u64 {
        black_box(&[depth; 16])[3] + recurse(depth + 1)
    }
    let mut domain = domain("deep");
    let violation = contain(&mut domain, || {
        black_box(recurse(0));
    });
    assert!(matches!(violation.kind(), ViolationKind::StackOverflow { .. }), "{violation}");
}

fn a_lost_stack_pointer() {
    let mut domain = domain("lost");
    // SAFETY: none: this is the mistake.
    let violation = contain(&mut domain, || unsafe { asm!("mov rsp, 64", "push rax", options(noreturn)) });
    assert!(matches!(violation.kind(), ViolationKind::Null { .. }), "{violation}");
}

fn an_illegal_instruction() {
    let mut domain = domain("illegal");
    // SAFETY: none: this is the mistake.
    let violation = contain(&mut domain, || unsafe { asm!("ud2") });
    assert_eq!(*violation.kind(), ViolationKind::IllegalInstruction);
}

fn a_division_by_zero() {
    let mut domain = domain("divide");
    // SAFETY: none: this is the mistake.
    let divide = || unsafe { asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _) };
    assert_eq!(*contain(&mut domain, divide).kind(), ViolationKind::Arithmetic);
}

fn a_breakpoint() {
    let mut domain = domain("break");
    // SAFETY: none: this is the mistake.
    let violation = contain(&mut domain, || unsafe { asm!("int3") });
    assert_eq!(*violation.kind(), ViolationKind::Breakpoint);
}

fn a_bus_error() {
    let mut domain = domain("bus");
    let path = std::env::temp_dir().join(format!("pkru-bus-{}", std::process::id()));
    let file = std::fs::File::create_new(&path).unwrap();
    file.set_len(4096).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: a new mapping touches nothing that exists.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, descriptor, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    std::fs::remove_file(&path).unwrap();
    // SAFETY: none: the file behind the page is gone.
    let violation = contain(&mut domain, || unsafe {
        black_box(page.cast::<u8>().read_volatile());
    });
    assert_eq!(*violation.kind(), ViolationKind::Bus { address: page as u64 });
}

fn a_panic() {
    let mut domain = domain("panic");
    for number in 0..3 {
        let violation = contain(&mut domain, || panic!("number {number} in a domain"));
        let ViolationKind::Panic { message: Some(message) } = violation.kind() else { panic!("{violation}") };
        assert!(message.contains(&format!("number {number} in a domain")), "{message}");
        assert!(message.contains("violations.rs"), "{message}");
    }
    // Panics that the compiler puts in.
    let index = black_box(7);
    let violation = contain(&mut domain, || {
        black_box([1, 2, 3][black_box(index)]);
    });
    let ViolationKind::Panic { message: Some(message) } = violation.kind() else { panic!("{violation}") };
    assert!(message.contains("index out of bounds"), "{message}");
    // Outside, panics go where they went.
    assert!(std::panic::catch_unwind(|| panic!("as ever")).is_err());
    assert!(!std::thread::panicking());
}

fn a_panic_with_a_hook_of_the_programs() {
    let mut domain = domain("panic");
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let violation = contain(&mut domain, || panic!("in a domain"));
    assert!(matches!(violation.kind(), ViolationKind::Panic { .. }), "{violation}");
}

fn a_panic_on_another_thread() {
    drop(domain("first"));
    let violation = std::thread::spawn(|| {
        let mut domain = Domain::builder("thread").build().unwrap();
        contain(&mut domain, || panic!("on a thread"))
    });
    let violation = violation.join().unwrap();
    assert!(violation.to_string().contains("on a thread"), "{violation}");
}

fn an_abort() {
    let mut domain = domain("abort");
    // SAFETY: none: this is the mistake.
    let ways: [&dyn Fn(); 3] = [&|| std::process::abort(), &|| unsafe { libc::abort() }, &|| unsafe {
        libc::raise(libc::SIGABRT);
    }];
    for way in ways {
        assert_eq!(*contain(&mut domain, way).kind(), ViolationKind::Abort);
    }
}

fn an_exit() {
    let mut domain = domain("exit");
    // SAFETY: none: this is the mistake.
    let ways: [&dyn Fn(); 2] = [&|| unsafe { libc::exit(3) }, &|| unsafe { libc::_exit(3) }];
    for way in ways {
        assert_eq!(*contain(&mut domain, way).kind(), ViolationKind::Exit { status: Some(3) });
    }
    // std flushes standard output first, with a lock.
    let violation = contain(&mut domain, || std::process::exit(3));
    assert!(matches!(violation.kind(), ViolationKind::Exit { .. }), "{violation}");
}

fn an_exhausted_heap_in_rust() {
    let mut domain = support::build(Domain::builder("full").heap_size(1 << 20));
    let violation = contain(&mut domain, || {
        black_box(vec![1u8; 3 << 20]);
    });
    assert_eq!(*violation.kind(), ViolationKind::OutOfMemory { size: 3 << 20 });
    let violation = contain(&mut domain, || {
        let mut blocks = Vec::new();
        loop {
            blocks.push(black_box(Box::new([0u8; 4096])));
            if blocks.len() > 1000 {
                break;
            }
        }
    });
    assert!(matches!(violation.kind(), ViolationKind::OutOfMemory { .. }), "{violation}");
}

fn a_loop_that_does_not_end() {
    let deadline = Duration::from_millis(200);
    let mut domain = support::build(Domain::builder("loop").deadline(deadline));
    for _ in 0..3 {
        let start = std::time::Instant::now();
        let violation = contain(&mut domain, loop_forever);
        assert_eq!(*violation.kind(), ViolationKind::Deadline);
        assert!(start.elapsed() >= deadline, "{:?}", start.elapsed());
    }
    // One that waits in the kernel.
    let violation = contain(&mut domain, || {
        // SAFETY: the call touches no memory.
        unsafe { libc::pause() };
    });
    assert_eq!(*violation.kind(), ViolationKind::Deadline);
    for _ in 0..200 {
        support::works(&mut domain);
    }
}

fn a_wild_jump() {
    let mut domain = domain("jump");
    // Memory that cannot be executed.
    static DATA: [u8; 16] = [0xc3; 16];
    // SAFETY: none: this is the mistake.
    let function = unsafe { std::mem::transmute::<*const u8, extern "C" fn()>(black_box(DATA.as_ptr())) };
    let violation = contain(&mut domain, || function());
    assert_eq!(violation.access(), Some(Access::Execute), "{violation}");
}

fn a_signal_that_code_sends_itself() {
    let mut domain = domain("raise");
    // SAFETY: none: this is the mistake.
    let violation = contain(&mut domain, || unsafe {
        libc::raise(libc::SIGSEGV);
    });
    assert_eq!(*violation.kind(), ViolationKind::Raised { signal: libc::SIGSEGV });
}

fn invalid_free(domain: &mut Domain, function: impl Fn()) -> HeapError {
    match contain(domain, function).kind() {
        ViolationKind::InvalidFree(error) => *error,
        other => panic!("{other:?}"),
    }
}

fn frees_of_what_is_no_block() {
    let mut domain = domain("free");
    let mut outside = Box::new(1u64);
    let foreign = &raw mut *outside;
    // SAFETY: none: this is the mistake.
    let error = invalid_free(&mut domain, || unsafe { libc::free(foreign.cast()) });
    assert_eq!(error, HeapError::Foreign { address: foreign as usize });
    assert_eq!(*outside, 1);

    let error = invalid_free(&mut domain, || {
        // SAFETY: none: this is the mistake.
        unsafe {
            let block = black_box(libc::malloc(100));
            libc::free(block);
            libc::free(black_box(block));
        }
    });
    assert!(matches!(error, HeapError::DoubleFree { .. }));

    let error = invalid_free(&mut domain, || {
        // SAFETY: none: this is the mistake.
        unsafe { libc::free(black_box(libc::malloc(100)).byte_add(32)) };
    });
    assert!(matches!(error, HeapError::NotABlock { .. }));
    // SAFETY: none: this is the mistake.
    let error = invalid_free(&mut domain, || unsafe {
        libc::realloc(foreign.cast(), 100);
    });
    assert_eq!(error, HeapError::Foreign { address: foreign as usize });
}

fn a_spoiled_fs_base() {
    thread_local! { static WORD: std::cell::Cell<u32> = const { std::cell::Cell::new(1) } }
    let mut domain = domain("fs");
    WORD.set(7);
    // On the way out the caller gets its own.
    // SAFETY: none: this is the mistake.
    let _ = domain.call(|| unsafe { asm!("wrfsbase {}", in(reg) 0x1000_u64) });
    assert_eq!(WORD.get(), 7);
    // Where the code goes on to use a thread-local, that is a violation like any other.
    let violation = domain.call(|| {
        // SAFETY: none: this is the mistake.
        unsafe { asm!("wrfsbase {}", in(reg) 0x1000_u64) };
        WORD.get()
    });
    assert!(violation.is_err());
    assert_eq!(WORD.get(), 7);
    support::works(&mut domain);
}

fn a_jump_to_32_bit_code() {
    let mut domain = domain("far");
    // Offset and selector of Linux's 32-bit code segment. A far return would do too, but QEMU 7.2 reads its stack as
    // the kernel.
    let target = [0x1000_u32, 0x23];
    // SAFETY: none: this is the mistake.
    let violation =
        contain(&mut domain, || unsafe { asm!("jmp fword ptr [{}]", in(reg) &raw const target, options(noreturn)) });
    assert_eq!(*violation.kind(), ViolationKind::Null { address: 0x1000, access: Access::Execute });
}

fn a_stack_pointer_in_the_signal_stack() {
    let mut domain = domain("lost");
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the struct is writable.
    unsafe { libc::syscall(libc::SYS_sigaltstack, std::ptr::null::<libc::stack_t>(), &raw mut stack) };
    for offset in [64, 200, 2000, 8000] {
        let place = stack.ss_sp as usize + offset;
        // SAFETY: none: this is the mistake.
        contain(&mut domain, || unsafe { asm!("mov rsp, {}", "ud2", in(reg) place, options(noreturn)) });
    }
}

fn memory_made_executable_only() {
    let mut domain = domain("exec");
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping touches nothing that exists.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0) };
    // Linux takes a key for such memory and changes the thread's rights to it.
    // SAFETY: the page is the test's.
    let protect = || unsafe { libc::mprotect(page, 4096, libc::PROT_EXEC) };
    assert_eq!(domain.call(protect).unwrap(), 0);
    contain(&mut domain, mistake);
    assert_eq!(domain.call(protect).unwrap(), 0);
    contain(&mut domain, || {
        protect();
        mistake();
    });
}

fn a_copy_of_the_process_made_in_a_domain_ends() {
    let mut domain = domain("fork");
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: none: a fork without the C library; the copy faults.
    let child = domain.call(|| unsafe {
        let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
        if child == 0 {
            mistake();
        }
        child
    });
    // Only one process gets here.
    // SAFETY: both descriptors are this process's.
    unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) };
    let mut status = 0;
    // SAFETY: the status is writable.
    unsafe { libc::waitpid(child.unwrap() as i32, &raw mut status, 0) };
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1, "{status:#x}");
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer has eight bytes.
    assert_eq!(unsafe { libc::read(pipe[0], bytes.as_mut_ptr().cast(), 8) }, 1);
}

/// Runs something while code in a domain of its own runs on another thread; that code is given the other domain's key.
fn while_another_runs(other: Domain, something: impl FnOnce(u64)) {
    static INSIDE: AtomicBool = AtomicBool::new(false);
    let key = u64::from(other.key().unwrap().number());
    let mut other = other;
    let running = std::thread::spawn(move || {
        INSIDE.store(true, Ordering::Relaxed);
        other.call(loop_forever).unwrap_err().kind().clone()
    });
    while !INSIDE.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(100));
    something(key);
    assert_eq!(
        running.join().unwrap(),
        ViolationKind::Deadline,
        "the other domain was still running, and was not disturbed"
    );
}

/// Code in a domain that does not end.
fn loop_forever() {
    loop {
        std::hint::spin_loop();
    }
}

fn other_domain() -> Domain {
    support::build(Domain::builder("other").deadline(Duration::from_secs(1)))
}

fn a_return_with_another_domains_key() {
    let other = other_domain();
    let mut domain = domain("liar");
    // The gate's return address is the first thing on the domain's stack, below the page through which results leave.
    let lie = |key: u64| {
        let stack: u64;
        // SAFETY: reading the stack pointer changes nothing.
        unsafe { asm!("mov {}, rsp", out(reg) stack) };
        let top = (stack + 4096) & !4095;
        // SAFETY: none: this is the mistake.
        unsafe { asm!("mov rbx, {}", "mov rsp, {}", "ret", in(reg) key, in(reg) top - 8, options(noreturn)) }
    };
    let own = u64::from(domain.key().unwrap().number());
    domain
        .call(|| {
            if black_box(true) {
                lie(own)
            }
        })
        .expect("control: with its own key it is a return");
    let idle = u64::from(other.key().unwrap().number());
    let violation = contain(&mut domain, || lie(idle));
    assert!(matches!(violation.kind(), ViolationKind::Null { .. }), "that key's domain does not run: {violation}");
    while_another_runs(other, |key| {
        let violation = contain(&mut domain, || lie(key));
        assert_eq!(*violation.kind(), ViolationKind::IllegalInstruction, "the claim is refuted");
    });
}

fn opening_the_key_of_a_running_domain() {
    let other = other_domain();
    let mut domain = domain("opener");
    while_another_runs(other, |key| {
        let rights = !(3u32 << (2 * key));
        // Whose fault it is is told by the thread, and not by the rights.
        contain(&mut domain, || {
            // SAFETY: none: the domain gives itself rights.
            unsafe {
                asm!("rdpkru", "and eax, {:e}", "wrpkru", in(reg) rights, out("eax") _, in("ecx") 0, out("edx") _);
            }
            mistake();
        });
    });
}

fn a_breakpoint_outside_any_domain_kills_the_process_as_before() {
    let _ = domain("bystander");
    // SAFETY: none: this is the fault.
    let status = support::in_child(|| unsafe { asm!("int3") });
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGTRAP, "{status:#x}");
}

fn spoiled_registers_are_restored() {
    let mut domain = domain("registers");
    let mxcsr = || {
        let mut value = 0u32;
        // SAFETY: the instruction stores four bytes.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value) };
        value
    };
    let x87 = || {
        let mut environment = [0u32; 7];
        // SAFETY: the instruction stores 28 bytes; it masks exceptions, which the one after undoes.
        unsafe { asm!("fnstenv [{0}]", "fldcw [{0}]", in(reg) &raw mut environment) };
        // The control word and the tags of the stack's registers.
        (environment[0] as u16, environment[2] as u16)
    };
    let gs_base = || {
        let base: u64;
        // SAFETY: reading the base changes nothing.
        unsafe { asm!("rdgsbase {}", out(reg) base) };
        base
    };
    let before = (mxcsr(), x87(), gs_base());
    let spoil = || {
        // Other rounding in MXCSR, other precision in the x87 control word.
        let (rounding, precision) = (0x7f80_u32, 0x007f_u32);
        // SAFETY: none: the caller's state is changed against the ABI.
        unsafe {
            asm!("ldmxcsr [{}]", "fldz", "fldcw [{}]", in(reg) &raw const rounding, in(reg) &raw const precision);
            asm!("wrgsbase {}", in(reg) 0x1234_5000_u64);
            asm!("std", "pushfq", "or dword ptr [rsp], 0x44000", "popfq");
        };
    };
    domain.call(spoil).unwrap();
    let flags: u64;
    // SAFETY: reading the flags changes nothing.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
    assert_eq!(flags & 0x44400, 0, "AC, NT and DF");
    assert_eq!((mxcsr(), x87(), gs_base()), before);
    assert_eq!(black_box(1.0_f64) / black_box(3.0), 1.0 / 3.0);
}

fn a_fault_outside_any_domain_kills_the_process_as_before() {
    let _ = domain("bystander");
    let status = support::in_child(mistake);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
}

fn deadlines_that_have_passed_at_once() {
    for time in [Duration::ZERO, Duration::from_nanos(1), Duration::from_micros(1), Duration::from_micros(50)] {
        let mut domain = support::build(Domain::builder("late").deadline(time));
        assert_eq!(*domain.call(loop_forever).unwrap_err().kind(), ViolationKind::Deadline, "{time:?}");
    }
}

fn a_stack_pointer_near_the_end_of_addresses() {
    static WORD: AtomicBool = AtomicBool::new(false);
    let mut domain = domain("end");
    let place = WORD.as_ptr();
    // SAFETY: none: this is the mistake.
    let violation = contain(&mut domain, || unsafe {
        asm!("mov rsp, -3", "mov byte ptr [{}], 1", in(reg) place, options(noreturn))
    });
    assert_eq!(violation.address(), Some(place as u64));
}
