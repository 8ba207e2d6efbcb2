//! A domain's memory: what lasts, what is dropped, what can be given to it, what is kept from it.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

use std::ffi::{c_char, c_int, c_void};
use std::hint::black_box;

use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
use pkru_userspace::{Access, Domain, Error, Region, RegionAccess, Vault, ViolationKind};
use support::{build, contain, domain, key_fault, mistake, suite, works};

suite! {
    a_transient_domain_is_clean_at_each_call,
    a_transient_domain_whose_result_is_not_received,
    a_shortage_of_memory_costs_no_keys,
    discard_gives_memory_back,
    nothing_of_the_old_contents_can_be_read,
    a_table_that_is_filled_at_first_use,
    state_in_a_static_of_the_program,
    a_librarys_data_can_be_given_to_a_domain,
    a_librarys_data_follows_the_domains_key,
    a_program_exits_while_a_domain_has_a_library,
    libraries_that_cannot_be_given,
    a_vault_is_closed_to_domains,
    a_vault_is_closed_to_a_domain_while_it_is_open_in_the_caller,
    a_region_is_shared_with_those_who_are_named,
    a_region_outlives_its_handle_and_gives_its_key_back,
    callocs_and_reallocarrays_products,
    a_domains_block_is_not_freed_outside,
    a_violation_says_so_when_the_domain_cannot_be_made_ready,
    safe_functions_open_nothing_in_a_domain,
    regions_leave_keys_for_domains,
    a_builder_that_fails_leaves_its_libraries_alone,
}

unsafe extern "C" {
    fn helper_table(index: u8) -> u32;
    fn helper_count() -> u64;
}

#[link(name = "libsqlite3.so.0", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C" {
    fn sqlite3_open(name: *const c_char, database: *mut *mut c_void) -> c_int;
    fn sqlite3_close(database: *mut c_void) -> c_int;
    fn sqlite3_initialize() -> c_int;
}

/// The bytes that this process has in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn a_transient_domain_is_clean_at_each_call() {
    let leak = || {
        let block = Vec::leak(vec![0x77u8; 64]);
        block.as_ptr() as usize
    };
    // SAFETY: none, in general: what is there is whatever the domain's memory holds.
    let look = |address: usize| move || unsafe { black_box(address as *const u8).read_volatile() };
    let mut persistent = domain("persistent");
    let address = persistent.call(leak).unwrap();
    assert_eq!(persistent.call(look(address)).unwrap(), 0x77, "control");

    let mut transient = build(Domain::builder("transient").transient());
    for _ in 0..3 {
        let address = transient.call(leak).unwrap();
        assert_eq!(transient.call(look(address)).unwrap(), 0);
    }
    thread_local! { static COUNT: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    let count = || {
        COUNT.set(COUNT.get() + 1);
        COUNT.get()
    };
    assert_eq!([persistent.call(count).unwrap(), persistent.call(count).unwrap()], [1, 2], "control");
    assert_eq!([transient.call(count).unwrap(), transient.call(count).unwrap()], [1, 1]);
    contain(&mut transient, mistake);
    let text = transient.call(|| String::from("results are copied first")).unwrap();
    assert_eq!(text, "results are copied first");
}

fn a_transient_domain_whose_result_is_not_received() {
    struct Unwelcome;
    impl Transfer for Unwelcome {
        type Wire = u8;

        fn lend(self) -> u8 {
            0
        }

        fn receive(_: u8, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
            panic!("not received")
        }
    }
    thread_local! { static COUNT: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    let count = || {
        COUNT.set(COUNT.get() + 1);
        Unwelcome
    };
    let mut transient = build(Domain::builder("transient").transient());
    let received = std::panic::AssertUnwindSafe(|| transient.call(count).is_ok());
    std::panic::catch_unwind(received).unwrap_err();
    assert_eq!(transient.call(|| COUNT.get()).unwrap(), 0);
    works(&mut transient);
}

fn a_shortage_of_memory_costs_no_keys() {
    let mut first = domain("first");
    works(&mut first);
    let limit = |bytes| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the struct is readable.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) }, 0);
    };
    for _ in 0..20 {
        // Room for the descriptions of a domain and not for its heap.
        limit((resident() + (8 << 20)) as u64);
        let failed = Domain::builder("too much").heap_size(256 << 20).build().err();
        let region = Region::new(256 << 20).err();
        limit(libc::RLIM_INFINITY);
        assert!(matches!(failed, Some(Error::System { errno: libc::ENOMEM, .. })), "{failed:?}");
        assert!(matches!(region, Some(Error::System { errno: libc::ENOMEM, .. })), "{region:?}");
    }
    works(&mut first);
    let mut domains: Vec<_> = (0..20).map(|_| domain("after")).collect();
    domains.iter_mut().for_each(works);
    assert!(domains.iter().filter(|domain| domain.key().is_some()).count() >= 11, "as many as there were");
}

fn discard_gives_memory_back() {
    const SIZE: usize = 32 << 20;
    let mut domain = domain("big");
    let before = resident();
    let fill = || {
        let block = black_box(Vec::leak(vec![black_box(1u8); SIZE]));
        block[SIZE - 1]
    };
    domain.call(fill).unwrap();
    assert!(resident() > before + SIZE / 2, "control");
    domain.discard();
    assert!(resident() < before + (1 << 20), "{} bytes more", resident() - before);
    domain.call(fill).unwrap();
    domain.call(mistake).unwrap_err();
    works(&mut domain);
    assert!(resident() < before + (1 << 20), "{} bytes more", resident() - before);
}

fn nothing_of_the_old_contents_can_be_read() {
    const MARK: u64 = 0x5ec2_e75e_c2e7_0001;
    fn scatter(depth: u32) -> u64 {
        let stack = black_box([MARK; 32]);
        Vec::leak(vec![MARK; 100]);
        if depth == 0 { stack[3] } else { scatter(depth - 1) + black_box(stack[7]) }
    }
    let mut domain = build(Domain::builder("old").stack_size(64 * 1024).heap_size(256 * 1024));
    let ranges = format!("{domain:?}");
    let range = |part: &str| {
        let text = ranges.split(&format!("{part}: ")).nth(1).unwrap().split([',', ' ']).next().unwrap();
        let (start, end) = text.split_once("..").unwrap();
        let number = |text: &str| usize::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        number(start)..number(end)
    };
    let (stack, heap) = (range("stack"), range("heap"));
    let look = || {
        let count = |range: &std::ops::Range<usize>| {
            // SAFETY: the range is the domain's.
            range.clone().step_by(8).filter(|address| unsafe { *(*address as *const u64) } == black_box(MARK)).count()
        };
        (count(&stack) + count(&heap)) as u64
    };
    domain.call(|| scatter(20)).unwrap();
    assert!(domain.call(look).unwrap() > 100, "control");
    domain.discard();
    // What the look itself has on the stack is not counted.
    assert!(domain.call(look).unwrap() <= 2);
}

fn a_table_that_is_filled_at_first_use() {
    let mut cold = domain("cold");
    // SAFETY: it has no preconditions.
    let look = || unsafe { helper_table(3) };
    let violation = cold.call(look).unwrap_err();
    assert_eq!(key_fault(&violation).access, Access::Write);
    let text = violation.to_string();
    for part in ["table of", "Builder::warm_up", "Globals::Writable"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("Builder::library"), "it is the program's own: {text}");
    // SAFETY: as above.
    let mut warm = build(Domain::builder("warm").warm_up(|| unsafe { helper_table(0) }));
    assert_eq!(warm.call(look).unwrap(), 3u32.wrapping_mul(2_654_435_761));
}

fn state_in_a_static_of_the_program() {
    let mut domain = domain("counter");
    // SAFETY: it has no preconditions.
    let count = || unsafe { helper_count() };
    let before = count();
    let violation = domain.call(count).unwrap_err();
    assert!(violation.target().unwrap().name().unwrap().contains("calls"), "{violation}");
    assert_eq!(count(), before + 1, "control");
}

fn open_and_close() -> i32 {
    let mut database = std::ptr::null_mut();
    // SAFETY: the name is a C string, and the place is writable.
    unsafe { sqlite3_open(c":memory:".as_ptr(), &raw mut database) + sqlite3_close(database) }
}

fn a_librarys_data_can_be_given_to_a_domain() {
    let mut without = domain("without");
    let violation = without.call(open_and_close).unwrap_err();
    let target = violation.target().expect("it is a static");
    assert!(target.library().to_string_lossy().contains("libsqlite3"), "{violation}");
    assert!(violation.to_string().contains("give the domain libsqlite3.so.0's data (Builder::library)"), "{violation}");

    // SAFETY: this process uses the library in that domain only.
    let mut domain = build(unsafe { Domain::builder("sqlite").library("libsqlite3.so") });
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
    contain(&mut domain, mistake);
    assert_eq!(domain.call(open_and_close).unwrap(), 0, "its statics are as they were at first");

    // Another domain can neither have it nor use it.
    // SAFETY: as above.
    let error = unsafe { Domain::builder("second").library("libsqlite3.so.0") }.build().unwrap_err();
    assert!(matches!(error, Error::LibraryInUse { .. }), "{error}");
    let fault = key_fault(&without.call(open_and_close).unwrap_err());
    assert_eq!(Some(fault.key), domain.key());
    drop(domain);
    // SAFETY: it has no preconditions; the library's data is the program's again, as it was.
    assert_eq!(unsafe { sqlite3_initialize() }, 0);
    assert_eq!(open_and_close(), 0);
}

fn a_librarys_data_follows_the_domains_key() {
    // SAFETY: this process uses the library in that domain only.
    let mut domain = build(unsafe { Domain::builder("sqlite").library("libsqlite3.so") });
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
    let mut others: Vec<_> = (0..20).map(|_| Domain::builder("other").build().unwrap()).collect();
    others.iter_mut().for_each(works);
    assert_eq!(domain.key(), None, "the others have all keys");
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
    assert!(others[3].call(open_and_close).is_err());
}

fn a_program_exits_while_a_domain_has_a_library() {
    drop(domain("first"));
    // The loader runs the library's destructors, which write its data. No thread has rights to it.
    let status = support::in_child(|| {
        // SAFETY: this process uses the library in that domain only.
        let mut domain = unsafe { Domain::builder("sqlite").library("libsqlite3.so") }.build().unwrap();
        assert_eq!(domain.call(open_and_close).unwrap(), 0);
        let mut others: Vec<_> = (0..20).map(|_| Domain::builder("other").build().unwrap()).collect();
        others.iter_mut().for_each(works);
        assert_eq!(domain.key(), None, "the others have all keys");
        std::mem::forget((domain, others));
        std::process::exit(7);
    });
    assert!(libc::WIFEXITED(status), "{status:#x}");
    assert_eq!(libc::WEXITSTATUS(status), 7);
}

fn libraries_that_cannot_be_given() {
    drop(domain("first"));
    for (name, expected) in [
        ("libc.so.6", "cannot be given away"),
        ("ld-linux-x86-64.so.2", "cannot be given away"),
        ("libnothing.so", "no library with the file name `libnothing.so`"),
        ("libsqlite", "no library with the file name `libsqlite`"),
    ] {
        // SAFETY: it is refused.
        let error = unsafe { Domain::builder("greedy").library(name) }.build().unwrap_err();
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
    }
}

fn a_vault_is_closed_to_domains() {
    let mut domain = domain("curious");
    let mut vault = Vault::new([0x5e_u8; 64]).unwrap();
    let address = vault.as_ptr().cast::<u8>();
    // SAFETY: none: this is the mistake.
    let read = || unsafe { address.read_volatile() };
    let violation = domain.call(read).unwrap_err();
    assert_eq!(key_fault(&violation).access, Access::Read);
    // SAFETY: none: this is the mistake.
    contain(&mut domain, || unsafe { address.cast_mut().write_volatile(0) });
    assert_eq!(vault.with(|bytes| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>()), 64 * 0x5e, "control");
    vault.with_mut(|bytes| bytes[0] = 1);
    assert_eq!(vault.with(|bytes| bytes[0]), 1);
    // By way of the kernel, from a domain and outside.
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: none: the kernel refuses.
    let send = || unsafe { libc::write(pipe[1], address.cast(), 64) as i64 };
    assert_eq!(domain.call(send).unwrap(), -1);
    assert_eq!(vault.with(|_| send()), 64, "control");
    // From a thread that has never called a domain.
    let other = std::thread::spawn(move || vault.with(|bytes| bytes[1]));
    assert_eq!(other.join().unwrap(), 0x5e);
}

fn a_vault_is_closed_to_a_domain_while_it_is_open_in_the_caller() {
    let mut domain = domain("curious");
    let vault = Vault::new(7u64).unwrap();
    let address = vault.as_ptr();
    // SAFETY: none: this is the mistake.
    let violation = vault.with(|_| domain.call(|| unsafe { address.read_volatile() })).unwrap_err();
    assert_eq!(key_fault(&violation).address, address as u64);
    assert_eq!(vault.with(|value| *value), 7);
}

fn a_region_is_shared_with_those_who_are_named() {
    drop(domain("first"));
    let region = Region::new(8192).unwrap();
    let mut writer = Domain::builder("writer").region(&region, RegionAccess::ReadWrite).build().unwrap();
    let mut reader = Domain::builder("reader").region(&region, RegionAccess::ReadOnly).build().unwrap();
    let mut stranger = Domain::builder("stranger").build().unwrap();
    let place = region.as_ptr();
    // SAFETY: the place is in the region.
    writer.call(|| unsafe { place.write_bytes(0x33, 100) }).unwrap();
    // SAFETY: as above.
    assert_eq!(reader.call(|| unsafe { place.add(99).read() }).unwrap(), 0x33);
    // SAFETY: none: this is the mistake.
    let write = || unsafe { place.write_volatile(1) };
    let read = || {
        // SAFETY: none: this is the mistake.
        black_box(unsafe { place.read_volatile() });
    };
    assert_eq!(key_fault(&contain(&mut reader, write)).access, Access::Write);
    assert_eq!(key_fault(&contain(&mut stranger, read)).access, Access::Read);
    let mut bytes = [0; 101];
    region.read(0, &mut bytes);
    assert_eq!((bytes[0], bytes[99], bytes[100]), (0x33, 0x33, 0));
    region.write(8190, &[1, 2]);
    // SAFETY: the place is in the region.
    assert_eq!(reader.call(|| unsafe { place.add(8191).read() }).unwrap(), 2);
    assert!(std::panic::catch_unwind(|| region.write(8191, &[1, 2])).is_err(), "beyond its end");
    // A violation drops the domain's own memory, and not the region's.
    contain(&mut writer, mistake);
    region.read(0, &mut bytes);
    assert_eq!(bytes[0], 0x33);
}

fn a_region_outlives_its_handle_and_gives_its_key_back() {
    drop(domain("first"));
    for _ in 0..40 {
        let region = Region::new(4096).unwrap();
        let place = region.as_ptr();
        let mut domain = Domain::builder("holder").region(&region, RegionAccess::ReadWrite).build().unwrap();
        drop(region);
        // SAFETY: the domain keeps the region.
        domain.call(|| unsafe { place.write(1) }).unwrap();
    }
    let mut regions = Vec::new();
    let error = loop {
        match Region::new(4096) {
            Ok(region) => regions.push(region),
            Err(error) => break error,
        }
        assert!(regions.len() < 16);
    };
    assert!(matches!(error, Error::KeysExhausted { .. }), "{error}");
    assert!(regions.len() >= 10, "{}", regions.len());
    regions.clear();
    works(&mut Domain::builder("again").build().unwrap());
}

fn callocs_and_reallocarrays_products() {
    let mut domain = domain("products");
    let answers = domain.call(|| {
        let half = usize::MAX / 2 + 1;
        // SAFETY: allocations that fail, or are kept. The compiler would leave them out if it could.
        unsafe {
            let block = black_box(libc::malloc(16));
            let results = [
                black_box(libc::calloc(half, 2)).is_null(),
                black_box(libc::reallocarray(block, half, 2)).is_null(),
                !black_box(libc::calloc(0, 0)).is_null(),
                !black_box(libc::malloc(0)).is_null(),
                black_box(libc::malloc(0)) != black_box(libc::malloc(0)),
                black_box(libc::malloc(black_box(usize::MAX))).is_null(),
            ];
            (results, *libc::__errno_location())
        }
    });
    assert_eq!(answers.unwrap(), ([true; 6], libc::ENOMEM));
}

fn a_domains_block_is_not_freed_outside() {
    let mut domain = domain("owner");
    // SAFETY: the block is never used.
    let block = domain.call(|| unsafe { libc::malloc(100) } as u64).unwrap() as *mut c_void;
    for resize in [false, true] {
        let status = support::in_child(|| {
            // SAFETY: none: this is the mistake.
            unsafe {
                if resize {
                    libc::realloc(block, 200) as usize
                } else {
                    libc::free(block);
                    0
                }
            };
        });
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{status:#x}");
    }
    // SAFETY: the domain's own.
    domain.call(|| unsafe { libc::free(block) }).expect("control");
}

fn a_violation_says_so_when_the_domain_cannot_be_made_ready() {
    let mut domain = domain("outer");
    // In a domain there are no others.
    let text = domain.call(|| Domain::builder("inner").build().map(drop).unwrap_err().to_string()).unwrap();
    assert!(text.contains("code in a domain cannot make"), "{text}");
    assert!(!matches!(contain(&mut domain, mistake).kind(), ViolationKind::NotReady(_)));
}

fn safe_functions_open_nothing_in_a_domain() {
    let mut domain = domain("insider");
    let vault = Vault::new(std::cell::Cell::new(7u64)).unwrap();
    let violation = domain.call(|| vault.with(std::cell::Cell::get)).unwrap_err();
    assert_eq!(key_fault(&violation).address, vault.as_ptr() as u64);
    contain(&mut domain, || vault.with(|value| value.set(666)));
    assert_eq!(vault.with(std::cell::Cell::get), 7, "control");

    let region = Region::new(4096).unwrap();
    let violation = contain(&mut domain, || region.write(0, b"written"));
    assert_eq!(key_fault(&violation).address, region.as_ptr() as u64);
    let mut bytes = [1; 7];
    region.read(0, &mut bytes);
    assert_eq!(bytes, [0; 7]);
    region.write(0, b"written");
    region.read(0, &mut bytes);
    assert_eq!(&bytes, b"written", "control");
}

fn regions_leave_keys_for_domains() {
    let mut domain = domain("owner");
    let mut regions = Vec::new();
    let result = domain.call_with(
        &mut [&mut |_| {
            while let Ok(region) = Region::new(4096) {
                regions.push(region);
            }
            1
        }],
        |callbacks| {
            // SAFETY: a callback takes up to six words and returns one.
            let ask: extern "C" fn() -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
            ask()
        },
    );
    // The call goes on, unless its own key went to a region; then it says so.
    match result {
        Ok(answer) => assert_eq!(answer, 1),
        Err(violation) => assert!(matches!(violation.kind(), ViolationKind::NotReady(_)), "{violation}"),
    }
    assert!(regions.len() >= 10, "{}", regions.len());
    works(&mut domain);
    works(&mut Domain::builder("another").build().unwrap());
    works(&mut domain);
    for size in [usize::MAX, usize::MAX - 8192, 1 << 60] {
        assert!(matches!(Region::new(size), Err(Error::Size { .. })));
    }
}

fn a_builder_that_fails_leaves_its_libraries_alone() {
    drop(domain("first"));
    for _ in 0..2 {
        // SAFETY: nothing is built.
        let builder = unsafe { Domain::builder("failing").library("libsqlite3.so").library("libnothing.so") };
        assert!(matches!(builder.build(), Err(Error::NoLibrary { .. })));
    }
    // SAFETY: this process uses the library in that domain only.
    let mut domain = unsafe { Domain::builder("sqlite").library("libsqlite3.so") }.build().unwrap();
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
}
