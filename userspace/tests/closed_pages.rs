//! Pages that code in a domain has made inaccessible. What the caller wants to read or write there is an error, and no
//! fault of the caller's.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::alloc::Layout;
use std::cell::Cell;
use std::ffi::c_void;
use std::hint::black_box;
use std::ptr;

use pkru_userspace::transfer::InvalidResult;
use pkru_userspace::{CallbackArguments, Domain, Region, RegionAccess, ViolationKind};
use support::{build, contain, domain, mistake, suite, works};

suite! {
    a_vector_on_a_closed_page,
    a_text_within_a_vector_on_an_unmapped_page,
    a_closed_mailbox,
    a_callbacks_data_on_a_closed_page,
    a_callbacks_request_on_a_closed_page,
    words_on_a_closed_page_of_the_stack,
    a_heap_whose_bookkeeping_is_on_a_closed_page,
    thread_locals_on_closed_pages,
    a_violation_opens_the_pages_again,
    a_closed_region,
}

const PAGE: usize = 4096;

/// Makes a page inaccessible to everyone, by a system call that this crate does not see.
fn close(address: usize) {
    let page = address & !(PAGE - 1);
    // SAFETY: deliberately unsound: the page is in use.
    let result = unsafe { libc::syscall(libc::SYS_mprotect, page, PAGE, libc::PROT_NONE) };
    assert_eq!(result, 0);
}

fn unmap(address: usize) {
    // SAFETY: deliberately unsound: the page is in use.
    assert_eq!(unsafe { libc::munmap((address & !(PAGE - 1)) as *mut c_void, PAGE) }, 0);
}

/// Returns the address of a page within a vector of bytes.
fn page_within(bytes: &[u8]) -> usize {
    (bytes.as_ptr().addr() + 2 * PAGE).next_multiple_of(PAGE)
}

/// Checks that a fault of the program's own still is one.
fn faults_are_still_the_programs() {
    let status = support::in_child(mistake);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
}

fn a_vector_on_a_closed_page() {
    let mut domain = domain("vector");
    let large = || vec![7u8; 8 * PAGE];
    assert_eq!(domain.call(large).unwrap(), [7; 8 * PAGE], "control");
    let address = domain.call(|| page_within(&large())).unwrap();
    let violation = domain.call(|| {
        let bytes = large();
        close(address);
        bytes
    });
    let inaccessible = InvalidResult::Inaccessible { address: address as u64 };
    let violation = violation.unwrap_err();
    assert_eq!(*violation.kind(), ViolationKind::InvalidResult(inaccessible));
    assert!(violation.to_string().contains("not accessible"), "{violation}");
    works(&mut domain);
    faults_are_still_the_programs();
}

fn a_text_within_a_vector_on_an_unmapped_page() {
    let mut domain = domain("text");
    let violation = domain.call(|| {
        let text = "x".repeat(8 * PAGE);
        unmap(page_within(text.as_bytes()));
        vec![Some(String::from("short")), Some(text)]
    });
    let violation = violation.unwrap_err();
    assert!(
        matches!(violation.kind(), ViolationKind::InvalidResult(InvalidResult::Inaccessible { .. })),
        "{violation}"
    );
    works(&mut domain);
}

/// Leaves the domain as if the call had ended, with a result of the code's choice.
fn leave(result: u64) -> ! {
    let rights: u32;
    // SAFETY: reading the register changes nothing.
    unsafe { std::arch::asm!("rdpkru", out("eax") rights, in("ecx") 0, out("edx") _) };
    // On Linux 6.1 the key of the signal stacks is open too. Its number is lower, because it was allocated first.
    let key = (1..16).rev().find(|key| rights >> (2 * key) & 3 == 0).unwrap();
    // SAFETY: this is the top of the domain's stack.
    unsafe { pkru::gate::suspend(key, result, mailbox() as u64) }
}

/// In a domain: returns the address of the mailbox, from which its stack goes down.
fn mailbox() -> usize {
    let local = 0u8;
    ptr::from_ref(black_box(&local)).addr().next_multiple_of(PAGE)
}

fn a_closed_mailbox() {
    let mut domain = domain("mailbox");
    for size in [1, 2, 4, 8, 24, 40] {
        let result: Result<u64, _> = domain.call(|| leave(0));
        assert!(result.is_ok(), "control: {result:?}");
        let address = domain.call(mailbox).unwrap();
        let end = || -> ! {
            close(address);
            leave(0)
        };
        let violation = match size {
            1 => domain.call(|| -> u8 { end() }).unwrap_err(),
            2 => domain.call(|| -> u16 { end() }).unwrap_err(),
            4 => domain.call(|| -> u32 { end() }).unwrap_err(),
            8 => domain.call(|| -> u64 { end() }).unwrap_err(),
            24 => domain.call(|| -> Option<String> { end() }).unwrap_err(),
            _ => domain.call(|| -> [u8; 40] { end() }).unwrap_err(),
        };
        let inaccessible = InvalidResult::Inaccessible { address: address as u64 };
        assert_eq!(*violation.kind(), ViolationKind::InvalidResult(inaccessible), "{size}");
        works(&mut domain);
    }
}

/// Calls a function with a callback and a page of the domain's heap. The callback gets the page's address.
fn with_page(visit: &mut dyn FnMut(&mut CallbackArguments<'_>) -> u64, act: impl Fn(usize)) {
    let mut domain = domain("callbacks");
    let result = domain.call_with(&mut [visit], |callbacks| {
        let bytes = vec![7u8; 8 * PAGE];
        let page = page_within(&bytes);
        act(page);
        // SAFETY: a callback takes up to six words and returns one.
        let ask: extern "C" fn(usize) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
        let answer = ask(page);
        std::mem::forget(bytes);
        answer
    });
    assert_eq!(result.unwrap(), 3);
}

fn a_callbacks_data_on_a_closed_page() {
    let mut seen = Vec::new();
    let mut visit = |arguments: &mut CallbackArguments<'_>| {
        let page = arguments.word(0);
        seen.push((arguments.read(page - 8, 16).map(|bytes| bytes.len()), arguments.write(page - 8, &[1; 16])));
        3
    };
    with_page(&mut visit, |_| {});
    with_page(&mut visit, close);
    let [(Ok(16), Ok(())), (Err(read), Err(write))] = seen[..] else { panic!("{seen:?}") };
    assert!(matches!(read, InvalidResult::Inaccessible { address } if address % 4096 == 0), "{read:?}");
    assert_eq!(read, write);
}

fn a_callbacks_request_on_a_closed_page() {
    let mut domain = domain("request");
    let address = domain.call(|| page_within(&vec![0; 8 * PAGE])).unwrap();
    let mut calls = 0;
    let result: Result<(), _> = domain.call_with(
        &mut [&mut |_| {
            calls += 1;
            0
        }],
        |_| {
            close(address);
            leave(address as u64)
        },
    );
    let violation = result.unwrap_err();
    assert_eq!((violation.kind(), calls), (&ViolationKind::Callback, 0));
}

/// What a violation was about is told by the words on the domain's stack.
fn words_on_a_closed_page_of_the_stack() {
    let mut domain = domain("stack");
    let act = |closes: bool| {
        move || {
            let bytes = black_box([7u8; 4 * PAGE]);
            if closes {
                close(page_within(&bytes));
            }
            // SAFETY: the function writes a static of the C library's.
            unsafe { libc::srand(black_box(5)) };
            black_box(bytes[0]);
        }
    };
    for closes in [false, true] {
        let violation = domain.call(act(closes)).unwrap_err();
        assert!(matches!(violation.kind(), ViolationKind::Key(_)), "{closes}: {violation}");
        works(&mut domain);
    }
}

fn a_heap_whose_bookkeeping_is_on_a_closed_page() {
    let size = 1 << 40;
    let sizes = [false, true].map(|closes| {
        let violation: Result<(), _> = domain("heap").call(|| {
            let first = Box::new(0u8);
            // SAFETY: the size is not 0.
            assert!(black_box(unsafe { std::alloc::alloc(Layout::array::<u8>(size).unwrap()) }).is_null());
            if closes {
                close(ptr::from_ref(&*first).addr());
            }
            std::alloc::handle_alloc_error(Layout::array::<u8>(size).unwrap());
        });
        match violation.unwrap_err().kind() {
            ViolationKind::OutOfMemory { size } => *size,
            other => panic!("{closes}: {other:?}"),
        }
    });
    assert_eq!(sizes, [size, 0]);
}

fn thread_locals_on_closed_pages() {
    thread_local! { static LOCAL: Cell<u64> = const { Cell::new(5) } }
    let mut domain = domain("thread-locals");
    let (local, kept) = domain
        .call(|| (LOCAL.with(|local| ptr::from_ref(local).addr()), Box::into_raw(Box::new(9u64)) as usize))
        .unwrap();
    let closed: Result<(), _> = domain.call(|| {
        close(local);
        leave(0)
    });
    assert_eq!(closed.unwrap(), ());
    let look = || {
        // SAFETY: the box lies on the domain's heap, which nothing has emptied.
        domain.call(|| (LOCAL.get(), unsafe { *(kept as *const u64) }))
    };
    assert_eq!(std::thread::scope(|scope| scope.spawn(look).join()).unwrap().unwrap(), (5, 9));
}

/// A violation ends what code in the domain has done to its pages, although no function of the C library's was asked.
fn a_violation_opens_the_pages_again() {
    thread_local! { static LOCAL: Cell<u64> = const { Cell::new(5) } }
    let mut domain = domain("closed");
    let places = || {
        let first_of_heap = Box::new(0u8);
        let places =
            [mailbox(), ptr::from_ref(&*first_of_heap).addr(), LOCAL.with(|local| ptr::from_ref(local).addr())];
        (places, mailbox() - 64 * PAGE)
    };
    let ([mailbox, heap, local], stack) = domain.call(places).unwrap();
    for place in [mailbox, heap, local, stack] {
        let touch = || {
            close(place);
            // SAFETY: none: this is the mistake.
            unsafe { black_box(place as *mut u8).write_volatile(1) };
        };
        let text = contain(&mut domain, touch).to_string();
        assert!(text.contains("whose mapping denies"), "{text}");
        let other = || {
            close(place);
            mistake();
        };
        // Here it shows when a later call uses the page.
        domain.call(other).unwrap_err();
        let _ = domain.call(|| (LOCAL.get(), vec![1]));
        works(&mut domain);
    }
}

fn a_closed_region() {
    let region = Region::new(4 * PAGE).unwrap();
    region.write(0, &[1; 4 * PAGE]);
    let mut domain = build(Domain::builder("region").region(&region, RegionAccess::ReadWrite));
    let address = region.as_ptr().addr() + PAGE;
    domain.call(|| close(address)).unwrap();
    let mut bytes = [0; 4 * PAGE];
    region.read(0, &mut bytes);
    assert_eq!(bytes, [1; 4 * PAGE]);
    domain.call(|| close(address)).unwrap();
    region.write(PAGE, &[2; PAGE]);
    region.read(PAGE, &mut bytes[..PAGE]);
    assert_eq!(bytes[..PAGE], [2; PAGE]);
}
