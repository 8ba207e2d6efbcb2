//! Code in a domain that maps memory, unmaps it, or changes its protection.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MAP_SHARED};
use libc::{PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE};
use pkru_userspace::{Domain, ViolationKind, set_key_limit};
use support::{NOWHERE, build, contain, domain, mistake, suite, works};

suite! {
    protections_are_undone,
    what_a_mistake_leaves_is_undone,
    a_guard_page_stops_an_overrun,
    the_page_where_the_heap_begins,
    a_hole_is_not_filled_and_a_discard_spares_the_program,
    what_the_caller_uses_is_not_changed,
    memory_that_is_not_the_domains,
    memory_that_a_domain_maps,
    mappings_are_counted,
    mappings_are_gone_after_a_discard,
    mappings_follow_the_domains_key,
    threads_map_while_keys_move,
    code_that_a_domain_writes,
    a_file_is_mapped,
    a_shared_mapping,
    mappings_grow_and_move,
    advice_and_locks,
    a_guarded_heap,
    services_with_callbacks_and_deadlines,
    requests_that_are_forged,
    there_are_only_so_many_changes,
    functions_that_change_more_than_the_domains_memory,
    a_child_that_shares_memory_maps,
}

const PAGE: usize = 4096;
const READ_WRITE: c_int = PROT_READ | PROT_WRITE;

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

/// Returns a block of whole pages of the calling code's heap.
fn block(size: usize) -> *mut c_void {
    // SAFETY: the function has no preconditions.
    unsafe { libc::memalign(PAGE, size) }
}

/// Writes and reads memory.
fn is_usable(start: *mut c_void, size: usize) -> bool {
    // SAFETY: deliberately unsound where it is not: the tests expect a violation then.
    unsafe {
        start.cast::<u8>().write_bytes(0x5a, size);
        std::slice::from_raw_parts(start.cast::<u8>(), size).iter().all(|byte| *byte == 0x5a)
    }
}

fn map(start: *mut c_void, size: usize, flags: c_int) -> *mut c_void {
    // SAFETY: what a fixed mapping replaces is the test's own, or the call is to fail.
    unsafe { libc::mmap(start, size, READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0) }
}

/// Fills most of a heap of 4 MiB.
fn fill() -> usize {
    let bytes = black_box(vec![1u8; 3 << 20]);
    bytes.iter().map(|byte| usize::from(*byte)).sum()
}

fn four_mib(name: &str) -> Domain {
    build(Domain::builder(name).heap_size(4 << 20))
}

/// Ways to change a page of one's own. The first is the control.
const CHANGES: [&str; 10] = [
    "nothing",
    "a guard page",
    "a table",
    "code",
    "code that is not read",
    "a fixed mapping",
    "a hole",
    "mremap",
    "a lock",
    "advice",
];

/// Changes a page. Returns whether that succeeds.
fn change(what: &str, page: *mut c_void) -> bool {
    // SAFETY: the page is the test's own.
    unsafe {
        match what {
            "nothing" => true,
            "a guard page" => libc::mprotect(page, PAGE, PROT_NONE) == 0,
            "a table" => libc::mprotect(page, PAGE, PROT_READ) == 0,
            "code" => libc::mprotect(page, PAGE, PROT_READ | PROT_EXEC) == 0,
            "code that is not read" => libc::mprotect(page, PAGE, PROT_EXEC) == 0,
            "a fixed mapping" => map(page, PAGE, MAP_FIXED) == page,
            "a hole" => libc::munmap(page, PAGE) == 0,
            "mremap" => libc::mremap(page, PAGE, 2 * PAGE, libc::MREMAP_MAYMOVE) != MAP_FAILED,
            "a lock" => libc::mlock(page, PAGE) == 0,
            "advice" => libc::madvise(page, PAGE, libc::MADV_DONTDUMP) == 0,
            _ => panic!("{what}"),
        }
    }
}

fn protections_are_undone() {
    for what in CHANGES {
        assert!(change(what, map(null_mut(), 2 * PAGE, 0)), "control: {what}");
        let mut domain = four_mib("changer");
        assert!(domain.call(|| change(what, block(2 * PAGE))).unwrap(), "{what}");
        domain.discard();
        for _ in 0..2 {
            assert_eq!(domain.call(fill).map_err(|violation| violation.to_string()), Ok(3 << 20), "{what}");
        }
    }
}

fn what_a_mistake_leaves_is_undone() {
    for what in CHANGES {
        let mut domain = four_mib("changer");
        for _ in 0..3 {
            let result = domain.call(|| {
                assert!(change(what, block(2 * PAGE)));
                mistake();
            });
            assert!(matches!(result.unwrap_err().kind(), ViolationKind::Null { .. }), "{what}");
            assert_eq!(domain.call(fill).map_err(|violation| violation.to_string()), Ok(3 << 20), "{what}");
        }
    }
}

fn a_guard_page_stops_an_overrun() {
    let overrun = |protection| {
        let block = block(3 * PAGE);
        // SAFETY: deliberately unsound with a guard page: the mistake under test.
        unsafe {
            assert_eq!(libc::mprotect(block.byte_add(2 * PAGE), PAGE, protection), 0);
            block.cast::<u8>().add(2 * PAGE).write_volatile(1);
            assert_eq!(libc::mprotect(block.byte_add(2 * PAGE), PAGE, READ_WRITE), 0);
            block as usize
        }
    };
    let mut domain = domain("guarded");
    domain.call(|| overrun(READ_WRITE)).expect("control");
    let violation = contain(&mut domain, || {
        overrun(PROT_NONE);
    });
    assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
}

fn the_page_where_the_heap_begins() {
    for protection in [PROT_READ, PROT_NONE] {
        let mut domain = four_mib("first page");
        let close = || {
            // SAFETY: the first block lies in the first page.
            unsafe {
                let page = libc::malloc(64) as usize & !(PAGE - 1);
                assert_eq!(libc::mprotect(page as *mut c_void, PAGE, protection), 0);
                std::alloc::handle_alloc_error(std::alloc::Layout::new::<u8>())
            }
        };
        // The caller reads the size of the last allocation that failed from that page.
        let violation = domain.call(|| -> () { close() }).unwrap_err();
        assert!(
            matches!(violation.kind(), ViolationKind::OutOfMemory { .. } | ViolationKind::Unmapped { .. }),
            "{violation}"
        );
        // SAFETY: the first block lies in the first page.
        let close = || unsafe {
            let page = libc::malloc(64) as usize & !(PAGE - 1);
            libc::mprotect(page as *mut c_void, PAGE, protection)
        };
        // The heap's records are in that page, and the heap is checked before the call returns.
        let violation = domain.call(close).unwrap_err();
        assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
        assert_eq!(domain.call(fill).unwrap(), 3 << 20);
    }
}

fn a_hole_is_not_filled_and_a_discard_spares_the_program() {
    const SIZE: usize = 1 << 20;
    let mut domain = four_mib("hole");
    let hole = domain.call(|| {
        let block = block(SIZE);
        // SAFETY: the block is the domain's own.
        assert_eq!(unsafe { libc::munmap(block, SIZE) }, 0);
        block as usize
    });
    let hole = hole.unwrap();
    // The kernel maps where it is asked to, if nothing is there.
    let ours: Vec<_> = (0..4).map(|_| map(hole as *mut c_void, SIZE, 0).cast::<u64>()).collect();
    // SAFETY: the mappings are this test's.
    ours.iter().for_each(|address| unsafe { address.write(0x1234) });
    assert!(ours.iter().all(|address| !(hole..hole + SIZE).contains(&address.addr())), "the hole is reserved");
    contain(&mut domain, mistake);
    assert_eq!(domain.call(fill).unwrap(), 3 << 20);
    // SAFETY: as above.
    assert!(ours.iter().all(|address| unsafe { address.read_volatile() } == 0x1234));
    // SAFETY: the mapping is this test's, and not used any more.
    unsafe { libc::munmap(ours[3].cast(), SIZE) };
    assert_eq!(map(ours[3].cast(), SIZE, 0), ours[3].cast(), "control");
}

fn what_the_caller_uses_is_not_changed() {
    let mut domain = domain("own");
    let thread_locals = || {
        // SAFETY: the function has no preconditions.
        let page = unsafe { libc::__errno_location() as usize } & !(PAGE - 1);
        // SAFETY: the call is to fail.
        (unsafe { libc::mprotect(page as *mut c_void, PAGE, PROT_NONE) }, errno())
    };
    assert_eq!(domain.call(thread_locals).unwrap(), (-1, libc::EPERM));
    let text = format!("{domain:?}");
    let stack_end = text.split("stack: ").nth(1).unwrap().split([',', ' ']).next().unwrap();
    let stack_end = stack_end.split("..0x").nth(1).unwrap();
    let mailbox = usize::from_str_radix(stack_end, 16).unwrap() - PAGE;
    // SAFETY: as above.
    let close = || (unsafe { libc::mprotect(mailbox as *mut c_void, PAGE, PROT_NONE) }, errno());
    assert_eq!(domain.call(close).unwrap(), (-1, libc::EPERM));
    works(&mut domain);
}

fn memory_that_is_not_the_domains() {
    let theirs = map(null_mut(), 2 * PAGE, 0);
    // SAFETY: the mapping is this test's.
    unsafe { theirs.cast::<u64>().write(7) };
    let theirs_as_number = theirs as usize;
    let mut other = domain("other");
    let others = other.call(|| block(PAGE) as usize).unwrap();
    let mut domain = domain("trespasser");
    let act = |what: usize, address: usize| {
        let address = address as *mut c_void;
        let fails = |result: c_int| (i64::from(result), errno());
        // SAFETY: each call is to fail.
        unsafe {
            match what {
                0 => fails(libc::mprotect(address, PAGE, PROT_READ)),
                1 => fails(libc::munmap(address, PAGE)),
                2 => fails(libc::madvise(address, PAGE, libc::MADV_DONTNEED)),
                3 => (map(address, PAGE, MAP_FIXED) as i64, errno()),
                4 => (libc::mremap(address, PAGE, 2 * PAGE, libc::MREMAP_MAYMOVE) as i64, errno()),
                5 => fails(libc::mlock(address, PAGE)),
                6 => fails(libc::munlock(address, PAGE)),
                7 => (map(address, PAGE, MAP_FIXED_NOREPLACE) as i64, errno()),
                _ => fails(libc::munmap((address as usize - (1 << 30)) as *mut c_void, 2 << 30)),
            }
        }
    };
    for address in [theirs_as_number, others] {
        for what in 0..9 {
            assert_eq!(domain.call(|| act(what, address)).unwrap(), (-1, libc::EPERM), "act {what}");
        }
    }
    // SAFETY: the mapping is this test's.
    assert_eq!(unsafe { theirs.cast::<u64>().read() }, 7);
    assert_eq!(act(0, theirs_as_number).0, 0, "control");
    assert_eq!(act(1, theirs_as_number).0, 0, "control");
    works(&mut other);
    works(&mut domain);
}

fn memory_that_a_domain_maps() {
    let mut domain = domain("mapper");
    let first = domain.call(|| {
        let memory = map(null_mut(), 3 * PAGE, 0);
        assert!(is_usable(memory, 3 * PAGE));
        memory as usize
    });
    let first = first.unwrap();
    let is_still_there = || {
        // SAFETY: the mapping lasts until a discard.
        unsafe { (first as *const u8).read() == 0x5a }
    };
    assert!(domain.call(is_still_there).unwrap());
    // A hint is taken where it is free.
    let hinted = domain.call(|| {
        let wanted = first + 64 * PAGE;
        assert_eq!(map(wanted as *mut c_void, PAGE, MAP_FIXED_NOREPLACE) as usize, wanted);
        assert_eq!((map(wanted as *mut c_void, PAGE, MAP_FIXED_NOREPLACE), errno()), (MAP_FAILED, libc::EEXIST));
        assert_ne!(map(wanted as *mut c_void, PAGE, 0) as usize, wanted);
        assert_eq!(map((wanted + PAGE) as *mut c_void, PAGE, 0) as usize, wanted + PAGE);
        wanted
    });
    hinted.unwrap();
    // Other domains cannot use it, and neither can the program write it without the key.
    let mut other = support::domain("other");
    let violation = contain(&mut other, || {
        is_usable(first as *mut c_void, 1);
    });
    assert!(matches!(violation.kind(), ViolationKind::Key(_)), "{violation}");
    // What is unmapped is not accessible any more, and is used again.
    let violation = contain(&mut domain, || {
        // SAFETY: deliberately unsound: the mistake under test.
        unsafe { assert_eq!(libc::munmap(first as *mut c_void, PAGE), 0) };
        is_usable(first as *mut c_void, 1);
    });
    assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
    let again = || {
        let (one, two) = (map(null_mut(), PAGE, 0), map(null_mut(), PAGE, 0));
        // SAFETY: the mapping is the domain's, and not used any more.
        unsafe { libc::munmap(one, PAGE) };
        assert_eq!(map(null_mut(), PAGE, 0), one);
        is_usable(two, PAGE)
    };
    assert!(domain.call(again).unwrap());
}

fn mappings_are_counted() {
    let mut domain = build(Domain::builder("counted").mapped_size(16 * PAGE));
    let take = |size: usize| (map(null_mut(), size, 0) as i64, errno());
    assert_eq!(domain.call(|| take(17 * PAGE)).unwrap(), (-1, libc::ENOMEM));
    assert_ne!(domain.call(|| take(16 * PAGE)).unwrap().0, -1);
    assert_eq!(domain.call(|| take(1)).unwrap(), (-1, libc::ENOMEM));
    domain.discard();
    assert_ne!(domain.call(|| take(16 * PAGE)).unwrap().0, -1);
    let mut none = build(Domain::builder("none").mapped_size(0));
    assert_eq!(none.call(|| take(1)).unwrap(), (-1, libc::ENOMEM));
    for size in [0, usize::MAX, usize::MAX - PAGE, 1 << 47] {
        let (result, errno) = none.call(|| take(size)).unwrap();
        assert!(result == -1 && [libc::EINVAL, libc::ENOMEM].contains(&errno), "{size:#x}");
    }
    works(&mut none);
}

fn mappings_are_gone_after_a_discard() {
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * PAGE
    };
    const SIZE: usize = 16 << 20;
    let mut domain = domain("mapper");
    works(&mut domain);
    let before = resident();
    let take = || {
        let memory = map(null_mut(), SIZE, 0);
        assert!(is_usable(memory, SIZE));
        memory as usize
    };
    let memory = domain.call(take).unwrap();
    assert!(resident() > before + SIZE / 2, "control");
    domain.discard();
    assert!(resident() < before + (1 << 20), "{} bytes more", resident() - before);
    let violation = contain(&mut domain, || {
        is_usable(memory as *mut c_void, 1);
    });
    assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
    // The kernel merges the reservation, so that nothing of the mappings is left.
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    domain.discard();
    let count = mappings();
    for _ in 0..20 {
        domain.call(take).unwrap();
        domain.call(mistake).unwrap_err();
    }
    domain.discard();
    assert!(mappings() <= count, "{} mappings more", mappings() - count);
}

fn mappings_follow_the_domains_key() {
    set_key_limit(3);
    let mut domains: Vec<_> = (0..4).map(|_| domain("one of many")).collect();
    // Each call takes the key of another domain.
    for page in [None, Some(0), Some(1), Some(2), Some(3)] {
        let prepare = || {
            let memory = map(null_mut(), 4 * PAGE, 0);
            assert!(is_usable(memory, 4 * PAGE));
            // SAFETY: the mapping is the domain's.
            unsafe {
                assert_eq!(libc::mprotect(memory.byte_add(PAGE), PAGE, PROT_READ), 0);
                assert_eq!(libc::mprotect(memory.byte_add(2 * PAGE), PAGE, PROT_NONE), 0);
            }
            memory as usize
        };
        let addresses: Vec<_> = domains.iter_mut().map(|domain| domain.call(prepare).unwrap()).collect();
        for (domain, address) in domains.iter_mut().zip(&addresses) {
            // SAFETY: the mapping is the domain's.
            let use_it = || unsafe {
                let memory = *address as *mut u8;
                memory.write(1);
                memory.add(3 * PAGE).write(1);
                memory.add(PAGE).read()
            };
            assert_eq!(domain.call(use_it).unwrap(), 0x5a);
        }
        let Some(page) = page else { continue };
        for (domain, address) in domains.iter_mut().zip(&addresses) {
            // SAFETY: deliberately unsound where it is not writable: the mistake under test.
            let write = || unsafe { ((address + page * PAGE) as *mut u8).write_volatile(2) };
            let result = domain.call(write).map_err(|violation| violation.kind().clone());
            assert_eq!(result.is_ok(), [true, false, false, true][page], "page {page}: {result:?}");
            assert!(matches!(result, Ok(()) | Err(ViolationKind::Unmapped { .. })), "page {page}: {result:?}");
        }
        for (index, address) in addresses.iter().enumerate() {
            // SAFETY: deliberately unsound: the mistake under test.
            let write = || unsafe { ((address + page * PAGE) as *mut u8).write_volatile(2) };
            let violation = contain(&mut domains[(index + 1) % 4], write);
            assert!(matches!(violation.kind(), ViolationKind::Key(_)), "another domain's page {page}: {violation}");
        }
    }
}

fn threads_map_while_keys_move() {
    set_key_limit(4);
    let churn = |seed: usize| {
        for n in 0..5 {
            let pages = 1 + (seed + n) % 5;
            let memory = map(null_mut(), pages * PAGE, 0);
            assert!(is_usable(memory, pages * PAGE));
            // SAFETY: the mapping is the domain's.
            unsafe {
                assert_eq!(libc::mprotect(memory, PAGE, PROT_READ), 0);
                assert_eq!(memory.cast::<u8>().read(), 0x5a);
                if n % 2 == 0 {
                    assert_eq!(libc::munmap(memory, pages * PAGE), 0);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut domains: Vec<_> = (0..3).map(|_| domain("one of many")).collect();
                for round in 0..100 {
                    for domain in &mut domains {
                        domain.call(|| churn(thread + round)).unwrap();
                    }
                    if round % 10 == 0 {
                        domains.iter_mut().for_each(|domain| drop(contain(domain, mistake)));
                        assert_eq!(support::in_child(|| ()), 0);
                    }
                }
            });
        }
    });
}

/// `mov eax, 42; ret`.
const ANSWER: [u8; 6] = [0xb8, 42, 0, 0, 0, 0xc3];

/// Writes a function to a page, and calls it.
fn generate(page: *mut c_void) -> i32 {
    // SAFETY: the page is writable, and the bytes are a function.
    unsafe {
        page.cast::<[u8; 6]>().write(ANSWER);
        assert_eq!(libc::mprotect(page, PAGE, PROT_READ | PROT_EXEC), 0);
        let function: extern "C" fn() -> i32 = std::mem::transmute(page);
        function()
    }
}

fn code_that_a_domain_writes() {
    assert_eq!(generate(map(null_mut(), PAGE, 0)), 42, "control");
    let mut domain = domain("compiler");
    for _ in 0..3 {
        assert_eq!(domain.call(|| generate(map(null_mut(), PAGE, 0))).unwrap(), 42);
        assert_eq!(domain.call(|| generate(block(PAGE))).unwrap(), 42);
        let at_once = || {
            // SAFETY: the arguments are valid.
            let page = unsafe {
                let all = PROT_READ | PROT_WRITE | PROT_EXEC;
                libc::mmap(null_mut(), PAGE, all, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            };
            generate(page)
        };
        assert_eq!(domain.call(at_once).unwrap(), 42);
        let violation = contain(&mut domain, || {
            let page = map(null_mut(), PAGE, 0);
            generate(page);
            is_usable(page, 1);
        });
        assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
    }
}

fn a_file_is_mapped() {
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let descriptor = file.as_raw_fd();
    let read = |protection: c_int, flags: c_int| {
        // SAFETY: the file is longer than a page.
        unsafe {
            let start = libc::mmap(null_mut(), 100, protection, flags, descriptor, 0).cast::<u8>();
            if start.cast() == MAP_FAILED { (0, errno()) } else { (u32::from(start.add(1).read()), 0) }
        }
    };
    let expected = (u32::from(b'E'), 0);
    assert_eq!(read(PROT_READ, MAP_PRIVATE), expected, "control");
    let mut domain = domain("reader");
    assert_eq!(domain.call(|| read(PROT_READ, MAP_PRIVATE)).unwrap(), expected);
    assert_eq!(domain.call(|| read(PROT_READ, MAP_SHARED)).unwrap(), expected);
    assert_eq!(domain.call(|| read(READ_WRITE, MAP_SHARED)).unwrap(), (0, libc::EACCES));
    let change = || {
        // SAFETY: as above; the change is private.
        unsafe {
            let start = libc::mmap(null_mut(), PAGE, READ_WRITE, MAP_PRIVATE, descriptor, 0).cast::<u8>();
            start.add(1).write(b'F');
            start.add(1).read()
        }
    };
    assert_eq!(domain.call(change).unwrap(), b'F');
    assert_eq!(domain.call(|| read(PROT_READ, MAP_PRIVATE)).unwrap(), expected);
    // SAFETY: there is no such descriptor.
    let bad = || (unsafe { libc::mmap(null_mut(), PAGE, PROT_READ, MAP_PRIVATE, 999, 0) } == MAP_FAILED, errno());
    assert_eq!(domain.call(bad).unwrap(), (true, libc::EBADF));
    contain(&mut domain, mistake);
    assert_eq!(domain.call(|| read(PROT_READ, MAP_PRIVATE)).unwrap(), expected);
}

fn a_shared_mapping() {
    // SAFETY: the name is a C string.
    let file = unsafe { libc::memfd_create(c"shared".as_ptr(), 0) };
    // SAFETY: the calls touch no memory of the program's.
    let ours = unsafe {
        assert_eq!(libc::ftruncate(file, PAGE as i64), 0);
        libc::mmap(null_mut(), PAGE, READ_WRITE, MAP_SHARED, file, 0).cast::<u8>()
    };
    let mut domain = domain("writer");
    // It has the descriptor, and could write the file in any case.
    // SAFETY: the mapping has this size.
    domain
        .call(|| unsafe { libc::mmap(null_mut(), PAGE, READ_WRITE, MAP_SHARED, file, 0).cast::<u8>().write(9) })
        .unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { ours.read_volatile() }, 9);
    contain(&mut domain, mistake);
    // SAFETY: as above.
    assert_eq!(unsafe { ours.read_volatile() }, 9, "a discard changes no file");
}

fn mappings_grow_and_move() {
    let grow = |pages: usize, is_in_the_way: bool, flags: c_int| {
        let memory = map(null_mut(), 2 * PAGE, 0);
        if is_in_the_way {
            map(memory.wrapping_byte_add(2 * PAGE), PAGE, MAP_FIXED_NOREPLACE);
        }
        assert!(is_usable(memory, 2 * PAGE));
        // SAFETY: the mapping is the domain's.
        let new = unsafe { libc::mremap(memory, 2 * PAGE, pages * PAGE, flags) };
        if new == MAP_FAILED {
            return (-1, errno());
        }
        // SAFETY: the new mapping has this many pages.
        let kept = unsafe { std::slice::from_raw_parts(new.cast::<u8>(), pages.min(2) * PAGE) };
        assert!(kept.iter().all(|byte| *byte == 0x5a));
        assert!(is_usable(new, pages * PAGE));
        (i32::from(new != memory), 0)
    };
    let mut domain = domain("grower");
    assert_eq!(domain.call(|| grow(9, false, 0)).unwrap(), (0, 0), "in place");
    assert_eq!(domain.call(|| grow(9, true, 0)).unwrap(), (-1, libc::ENOMEM), "something is in the way");
    assert_eq!(domain.call(|| grow(9, true, libc::MREMAP_MAYMOVE)).unwrap(), (1, 0), "to another place");
    assert_eq!(domain.call(|| grow(1, true, 0)).unwrap(), (0, 0), "smaller");
    assert_eq!(domain.call(|| grow(1 << 20, false, libc::MREMAP_MAYMOVE)).unwrap(), (-1, libc::ENOMEM), "too large");
    contain(&mut domain, mistake);
    assert_eq!(domain.call(|| grow(9, false, 0)).unwrap(), (0, 0));
}

fn advice_and_locks() {
    let mut domain = domain("adviser");
    for advice in [libc::MADV_NORMAL, libc::MADV_RANDOM, libc::MADV_WILLNEED, libc::MADV_NOHUGEPAGE] {
        // SAFETY: the advice changes no contents.
        assert_eq!(domain.call(|| unsafe { libc::madvise(block(PAGE), PAGE, advice) }).unwrap(), 0, "{advice}");
    }
    let empty = || {
        let page = block(PAGE);
        is_usable(page, PAGE);
        // SAFETY: the page is the domain's.
        unsafe { (libc::madvise(page, PAGE, libc::MADV_DONTNEED), page.cast::<u8>().read()) }
    };
    assert_eq!(domain.call(empty).unwrap(), (0, 0));
    // SAFETY: the call is to fail.
    let poison = || (unsafe { libc::madvise(block(PAGE), PAGE, libc::MADV_DONTFORK) }, errno());
    assert_eq!(domain.call(poison).unwrap(), (-1, libc::EPERM));
    for _ in 0..3 {
        // SAFETY: locking changes no contents.
        let lock = || unsafe {
            let page = block(PAGE);
            (libc::mlock(page, PAGE), libc::munlock(page, PAGE), libc::mlock(page.byte_add(8), 8))
        };
        assert_eq!(domain.call(lock).unwrap(), (0, 0, 0));
        contain(&mut domain, mistake);
    }
}

fn a_guarded_heap() {
    /// Allocates as debugging allocators do: each block ends where a guard page begins.
    fn allocate(size: usize) -> *mut u8 {
        let pages = size.next_multiple_of(PAGE);
        // SAFETY: the arguments are valid.
        unsafe {
            let start = libc::mmap(null_mut(), pages + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            assert_eq!(libc::mprotect(start, pages, READ_WRITE), 0);
            start.cast::<u8>().add(pages - size)
        }
    }
    let fill = |extra: usize| {
        let blocks: Vec<_> = (1..100).map(|n| (allocate(n * 50), n * 50)).collect();
        // SAFETY: deliberately unsound with an extra byte: the mistake under test.
        blocks.iter().for_each(|(block, size)| unsafe { block.write_bytes(1, size + extra) });
        blocks.len()
    };
    let mut domain = domain("guarded");
    assert_eq!(domain.call(|| fill(0)).unwrap(), 99);
    for _ in 0..2 {
        let violation = contain(&mut domain, || {
            fill(1);
        });
        assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
        assert_eq!(domain.call(|| fill(0)).unwrap(), 99);
    }
}

fn services_with_callbacks_and_deadlines() {
    let limited = Domain::builder("limited").deadline(std::time::Duration::from_secs(20)).transient();
    for mut domain in [domain("plain"), build(limited)] {
        let mut seen = Vec::new();
        let result = domain.call_with(
            &mut [&mut |arguments| {
                seen.push(arguments.word(0));
                arguments.word(0) + 1
            }],
            |callbacks| {
                // SAFETY: the callback takes a number.
                let visit: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
                let memory = map(null_mut(), PAGE, 0).cast::<u64>();
                // SAFETY: the mapping is the domain's.
                unsafe { memory.write(visit(1)) };
                assert!(is_usable(map(null_mut(), PAGE, 0), PAGE));
                // SAFETY: as above.
                visit(unsafe { memory.read() })
            },
        );
        assert_eq!((result.unwrap(), seen), (3, vec![1, 2]));
        assert!(domain.call(|| is_usable(map(null_mut(), PAGE, 0), PAGE)).unwrap());
    }
    let mut domain = domain("passes a mapping");
    let mut read = Vec::new();
    let result = domain.call_with(
        &mut [&mut |arguments| {
            read.push(arguments.read(arguments.word(0), 3).map_err(|error| error.to_string()));
            0
        }],
        |callbacks| {
            // SAFETY: the callback takes a pointer.
            let visit: extern "C" fn(*mut c_void) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
            let memory = map(null_mut(), PAGE, 0);
            is_usable(memory, PAGE);
            visit(memory);
            // SAFETY: the mapping is the domain's.
            unsafe { libc::munmap(memory, PAGE) };
            visit(memory);
        },
    );
    result.unwrap();
    assert!(read[0] == Ok(vec![0x5a; 3]) && read[1].is_err(), "{read:?}");
    let short = Domain::builder("short").deadline(std::time::Duration::from_millis(50));
    let violation = build(short).call(|| -> () {
        loop {
            let page = map(null_mut(), PAGE, 0);
            // SAFETY: the mapping is the domain's, and not used any more.
            unsafe { libc::munmap(page, PAGE) };
        }
    });
    assert_eq!(*violation.unwrap_err().kind(), ViolationKind::Deadline);
}

/// Leaves the domain with this word, as a request does.
fn leave(word: usize, key: u64, stack_end: usize) {
    // SAFETY: deliberately unsound: the mistake under test. The gate's return address lies at the end of the stack.
    unsafe {
        std::arch::asm!(
            "mov rbx, rcx",
            "lea rsp, [rdx - 8]",
            "ret",
            in("rdx") stack_end,
            in("rcx") key,
            in("rax") word,
            options(noreturn),
        );
    }
}

fn requests_that_are_forged() {
    let mut domain = domain("forger");
    let text = format!("{domain:?}");
    let stack = text.split("stack: ").nth(1).unwrap().split([',', ' ']).next().unwrap().to_string();
    let stack_end = usize::from_str_radix(stack.split("..0x").nth(1).unwrap(), 16).unwrap() - PAGE;
    let theirs = Box::new([0u64; 16]);
    let key = u64::from(domain.key().unwrap().number());
    for request in [NOWHERE, theirs.as_ptr().addr(), usize::MAX, stack_end + PAGE - 8, stack_end + 2 * PAGE, 1] {
        let violation = contain(&mut domain, || leave(request, key, stack_end));
        assert_eq!(*violation.kind(), ViolationKind::Callback, "{request:#x}: {violation}");
    }
    // A request for something that there is not, and one in a page that the domain has closed.
    for is_closed in [false, true] {
        let violation = contain(&mut domain, || {
            let request = block(PAGE);
            // SAFETY: the page is the domain's.
            unsafe {
                request.cast::<u64>().write(if is_closed { 1 << 32 } else { (1 << 32) + 1000 });
                assert!(!is_closed || libc::mprotect(request, PAGE, PROT_NONE) == 0);
            }
            leave(request as usize, key, stack_end);
        });
        assert_eq!(*violation.kind(), ViolationKind::Callback, "{violation}");
    }
}

fn there_are_only_so_many_changes() {
    let mut domain = build(Domain::builder("many").mapped_size(32 << 20));
    let change = || {
        let memory = map(null_mut(), 16 << 20, 0);
        let protect = |page: usize| {
            // SAFETY: the mapping is the domain's.
            unsafe { libc::mprotect(memory.byte_add(2 * page * PAGE), PAGE, PROT_READ) }
        };
        let count = (0..2048).take_while(|page| protect(*page) == 0).count();
        (count, errno())
    };
    let (count, errno) = domain.call(change).unwrap();
    assert!((400..1024).contains(&count) && errno == libc::ENOMEM, "{count}");
    contain(&mut domain, mistake);
    assert_eq!(domain.call(change).unwrap(), (count, errno));
}

fn functions_that_change_more_than_the_domains_memory() {
    unsafe extern "C" {
        fn pkey_free(key: c_int) -> c_int;
        fn pkey_alloc(flags: u32, rights: u32) -> c_int;
        fn pkey_mprotect(start: *mut c_void, size: usize, protection: c_int, key: c_int) -> c_int;
    }
    let mut domain = domain("meddler");
    let key = c_int::from(domain.key().unwrap().number());
    // SAFETY: the calls are to fail.
    let meddle = || unsafe {
        let page = block(PAGE);
        [pkey_free(key), pkey_alloc(0, 0), pkey_mprotect(page, PAGE, READ_WRITE, 0), libc::mlockall(libc::MCL_CURRENT)]
    };
    assert_eq!(domain.call(meddle).unwrap(), [-1; 4]);
    // SAFETY: as above.
    assert_eq!(domain.call(|| unsafe { (libc::sbrk(4096) as i64, errno()) }).unwrap(), (-1, libc::ENOMEM));
    // SAFETY: the break moves back.
    unsafe { assert!(libc::sbrk(4096) != MAP_FAILED && libc::sbrk(-4096) != MAP_FAILED, "control") };
    works(&mut domain);
}

fn a_child_that_shares_memory_maps() {
    unsafe extern "C" {
        fn helper_vfork_and(function: extern "C" fn() -> c_int) -> c_int;
    }
    extern "C" fn act() -> c_int {
        i32::from(is_usable(map(null_mut(), PAGE, 0), PAGE))
    }
    // SAFETY: the child runs the function and exits.
    assert_eq!(unsafe { helper_vfork_and(act) }, 1 << 8, "control");
    // The child has no timer of its parent's.
    let limited = Domain::builder("limited").deadline(std::time::Duration::from_secs(20));
    for mut domain in [domain("parent"), build(limited)] {
        for _ in 0..2 {
            // SAFETY: as above.
            assert_eq!(domain.call(|| unsafe { helper_vfork_and(act) }).unwrap(), 1 << 8);
            assert!(domain.call(|| is_usable(map(null_mut(), PAGE, 0), PAGE)).unwrap());
            contain(&mut domain, mistake);
        }
    }
}
