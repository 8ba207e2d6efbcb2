//! Callbacks, and calls within calls.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::c_void;

use pkru_userspace::transfer::InvalidResult;
use pkru_userspace::{Callback, Domain, ViolationKind};
use support::{build, contain, domain, mistake, suite, works};

suite! {
    c_code_calls_back,
    six_arguments_and_registers_that_survive,
    a_callback_runs_with_the_callers_rights_and_thread_locals,
    what_a_callback_is_given_is_checked,
    a_callback_of_an_earlier_call,
    a_request_that_is_forged,
    calls_nest_and_each_rewinds_to_its_own_caller,
    calls_nest_deeper_than_there_are_keys,
    a_panic_in_a_callback_goes_on_in_the_caller,
    a_deadline_includes_callbacks,
    a_fork_in_a_callback_keeps_the_deadline,
    a_callback_outside_any_domain_ends_the_program,
}

unsafe extern "C" {
    fn helper_walk(limit: u64, visit: *const c_void, data: *mut c_void) -> u64;
    fn helper_keep(function: *const c_void) -> *mut c_void;
    fn helper_call_kept(place: *mut c_void, argument: u64) -> u64;
}

/// Calls a callback as C code would.
fn ask(callback: Callback, argument: u64) -> u64 {
    // SAFETY: a callback takes up to six words and returns one.
    let function: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(callback.pointer()) };
    function(argument)
}

fn c_code_calls_back() {
    let mut domain = domain("walker");
    let mut seen = Vec::new();
    let mut visit = |arguments: &mut pkru_userspace::CallbackArguments<'_>| {
        seen.push((arguments.word(0), arguments.word(1)));
        arguments.word(0) * 10
    };
    let sum = domain.call_with(&mut [&mut visit], |callbacks| {
        // SAFETY: the callback has the type that the function expects.
        unsafe { helper_walk(5, callbacks[0].pointer(), 0x77 as *mut c_void) }
    });
    assert_eq!(sum.unwrap(), 100);
    assert_eq!(seen, [(0, 0x77), (1, 0x77), (2, 0x77), (3, 0x77), (4, 0x77)]);
}

fn six_arguments_and_registers_that_survive() {
    let mut domain = domain("six");
    let mut words = [0; 6];
    let mut note = |arguments: &mut pkru_userspace::CallbackArguments<'_>| {
        words = std::array::from_fn(|index| arguments.word(index));
        u64::MAX
    };
    let result = domain.call_with(&mut [&mut note], |callbacks| {
        type Function = extern "C" fn(u64, u64, u64, u64, u64, u64) -> u64;
        // SAFETY: a callback takes up to six words and returns one.
        let function: Function = unsafe { std::mem::transmute(callbacks[0].pointer()) };
        let kept: Vec<u64> = (0..20).map(std::hint::black_box).collect();
        let answer = function(1, 2, 3, 4, 5, 6);
        (answer, kept.iter().sum::<u64>())
    });
    assert_eq!(result.unwrap(), (u64::MAX, 190));
    assert_eq!(words, [1, 2, 3, 4, 5, 6]);
}

fn a_callback_runs_with_the_callers_rights_and_thread_locals() {
    thread_local! { static MARK: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    let mut domain = domain("rights");
    MARK.set(5);
    let mut log = String::new();
    let mut write = |_: &mut pkru_userspace::CallbackArguments<'_>| {
        log.push_str("in the caller's heap");
        MARK.set(MARK.get() + 1);
        u64::from(MARK.get())
    };
    let result = domain.call_with(&mut [&mut write], |callbacks| {
        MARK.set(100);
        (ask(callbacks[0], 0), MARK.get())
    });
    assert_eq!(result.unwrap(), (6, 100));
    assert_eq!((MARK.get(), log.as_str()), (6, "in the caller's heap"));
}

fn what_a_callback_is_given_is_checked() {
    let mut domain = domain("liar");
    let secret = Box::new(0x5ec2_u64);
    let outside = &raw const *secret as u64;
    let mut results = Vec::new();
    let mut read = |arguments: &mut pkru_userspace::CallbackArguments<'_>| {
        let (address, length) = (arguments.word(0), arguments.word(1) as usize);
        results.push(arguments.read(address, length));
        u64::from(arguments.write(address, &[9; 4]).is_ok())
    };
    let written = domain.call_with(&mut [&mut read], |callbacks| {
        // SAFETY: a callback takes up to six words and returns one.
        let read: extern "C" fn(u64, u64) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
        let own = vec![1u8, 2, 3, 4];
        let answers = [
            read(own.as_ptr() as u64, 4),
            read(outside, 8),
            read(0, 8),
            read(own.as_ptr() as u64, u64::MAX),
            read(u64::MAX - 3, 8),
        ];
        (answers, std::hint::black_box(own))
    });
    assert_eq!(written.unwrap(), ([1, 0, 0, 1, 0], vec![9, 9, 9, 9]));
    assert_eq!(results[0], Ok(vec![1, 2, 3, 4]));
    assert!(matches!(results[1], Err(InvalidResult::OutOfBounds { address, length: 8 }) if address == outside));
    assert!(results[2..].iter().all(Result::is_err), "{results:?}");
    assert_eq!(*secret, 0x5ec2);
}

fn a_callback_of_an_earlier_call() {
    let mut domain = domain("keeper");
    let mut calls = 0;
    let place = domain
        .call_with(&mut [&mut |_| 1], |callbacks| {
            // SAFETY: the function only stores the pointer.
            unsafe { helper_keep(callbacks[0].pointer()) as u64 }
        })
        .unwrap();
    // SAFETY: deliberately unsound: the callback's call has ended.
    let violation = domain.call(|| unsafe { helper_call_kept(place as *mut c_void, 3) }).unwrap_err();
    assert_eq!(*violation.kind(), ViolationKind::Callback);
    works(&mut domain);
    // A callback number beyond the last.
    let violation = domain.call_with(
        &mut [&mut |_| {
            calls += 1;
            0
        }],
        |callbacks| {
            // SAFETY: deliberately unsound: there is no such callback.
            let next: extern "C" fn() -> u64 =
                unsafe { std::mem::transmute(callbacks[0].pointer().wrapping_byte_add(16)) };
            next()
        },
    );
    assert_eq!(*violation.unwrap_err().kind(), ViolationKind::Callback);
    assert_eq!(calls, 0);
    works(&mut domain);
}

fn a_request_that_is_forged() {
    let mut domain = domain("forger");
    let mut calls = 0;
    for address in [8u64, &raw const calls as u64, u64::MAX - 8, 1 << 63] {
        let violation: Result<(), _> = domain.call_with(
            &mut [&mut |_| {
                calls += 1;
                0
            }],
            |_| {
                let stack: u64;
                // SAFETY: deliberately unsound: it returns to the gate with a forged request.
                unsafe {
                    std::arch::asm!("mov {}, rsp", out(reg) stack);
                    let key = pkru_userspace_key();
                    let top = (stack + 4096) & !4095;
                    std::arch::asm!("mov rbx, {}", "mov rax, {}", "mov rsp, {}", "ret",
                    in(reg) key, in(reg) address, in(reg) top - 8, options(noreturn));
                }
            },
        );
        let violation = violation.unwrap_err();
        assert!(matches!(violation.kind(), ViolationKind::Callback), "{violation}");
        works(&mut domain);
    }
    assert_eq!(calls, 0);
}

/// Returns the number of the running domain's key, found from its rights.
fn pkru_userspace_key() -> u64 {
    let rights: u32;
    // SAFETY: reading the register changes nothing.
    unsafe { std::arch::asm!("rdpkru", out("eax") rights, in("ecx") 0, out("edx") _) };
    // On Linux 6.1 the key of the signal stacks is open too. Its number is lower, because it was allocated first.
    (1..16).rev().find(|key| rights >> (2 * key) & 3 == 0).unwrap_or(0)
}

fn calls_nest_and_each_rewinds_to_its_own_caller() {
    let mut outer = domain("outer");
    let mut inner = domain("inner");
    let mut violations = Vec::new();
    let result = outer.call_with(
        &mut [&mut |arguments| {
            violations.push(contain(&mut inner, mistake).domain().to_owned());
            let argument = arguments.word(0);
            inner.call(|| argument * 2).unwrap()
        }],
        |callbacks| ask(callbacks[0], 21) + ask(callbacks[0], 0),
    );
    assert_eq!(result.unwrap(), 42);
    assert_eq!(violations, ["inner", "inner"]);
    // The outer call fails after the inner call has returned.
    let violation = outer.call_with(&mut [&mut |_| inner.call(|| 1).unwrap()], |callbacks| {
        ask(callbacks[0], 0);
        mistake();
    });
    assert_eq!(violation.unwrap_err().domain(), "outer");
    works(&mut outer);
    works(&mut inner);
}

fn calls_nest_deeper_than_there_are_keys() {
    fn descend(depth: u64) -> u64 {
        let mut domain = Domain::builder("level").stack_size(64 * 1024).heap_size(64 * 1024).build().unwrap();
        if depth == 0 {
            contain(&mut domain, mistake);
            return 1;
        }
        let kept = std::hint::black_box(depth);
        let result = domain.call_with(&mut [&mut |_| descend(depth - 1)], |callbacks| {
            let text = format!("level {kept}");
            let below = ask(callbacks[0], 0);
            // Its heap and stack are unchanged.
            below + u64::from(text == format!("level {kept}"))
        });
        contain(&mut domain, mistake);
        result.unwrap()
    }
    drop(domain("first"));
    assert_eq!(descend(40), 41);
}

fn a_panic_in_a_callback_goes_on_in_the_caller() {
    let mut domain = domain("panic");
    domain.call(|| Vec::leak(vec![7u8; 100]).len() as u64).unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        domain.call_with(&mut [&mut |_| panic!("in the caller")], |callbacks| ask(callbacks[0], 0))
    }));
    assert_eq!(*result.unwrap_err().downcast::<&str>().unwrap(), "in the caller");
    works(&mut domain);
    contain(&mut domain, mistake);
}

fn a_deadline_includes_callbacks() {
    use std::time::Duration;
    let mut domain = build(Domain::builder("slow").deadline(Duration::from_secs(1)));
    let violation = domain.call_with(
        &mut [&mut |_| {
            std::thread::sleep(Duration::from_secs(2));
            0
        }],
        |callbacks| ask(callbacks[0], 0),
    );
    assert_eq!(*violation.unwrap_err().kind(), ViolationKind::Deadline);
    works(&mut domain);
}

fn a_fork_in_a_callback_keeps_the_deadline() {
    use std::time::Duration;
    let mut domain = build(Domain::builder("forks").deadline(Duration::from_secs(60)));
    let mut child = -1;
    let result = domain.call_with(
        &mut [&mut |_| {
            // SAFETY: the child makes calls and exits.
            child = unsafe { libc::fork() };
            assert!(child >= 0, "cannot fork");
            0
        }],
        |callbacks| ask(callbacks[0], 0),
    );
    if child == 0 {
        let good = matches!(result, Ok(0)) && domain.call(|| 1).is_ok();
        // SAFETY: `_exit` runs none of the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!((result.unwrap(), status), (0, 0));
}

fn a_callback_outside_any_domain_ends_the_program() {
    let mut domain = domain("outside");
    let pointer = domain.call_with(&mut [&mut |_| 0], |callbacks| callbacks[0].pointer() as u64).unwrap();
    let status = support::in_child(|| {
        // SAFETY: deliberately unsound: the mistake under test.
        let function: extern "C" fn() -> u64 = unsafe { std::mem::transmute(pointer) };
        function();
    });
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{status:#x}");
}
