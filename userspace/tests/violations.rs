//! Failures in a domain. Each is a violation of its own kind, and the domain works afterwards.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::arch::asm;
use std::hint::black_box;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pkru_userspace::{Access, Domain, HeapError, ViolationKind};
use support::{NOWHERE, contain, domain, key_fault, mistake, suite};

suite! {
    a_key_fault_names_everything,
    a_closure_is_named,
    a_run_past_the_end_of_the_domains_own_memory,
    what_a_violation_displays_is_settled_when_it_occurs,
    a_librarys_path_that_leads_elsewhere_is_not_read,
    closures_that_are_one_function_keep_their_names,
    advice_follows_from_what_was_done,
    a_null_write,
    a_jump_to_nowhere,
    an_address_that_is_none,
    a_stack_overflow,
    a_lost_stack_pointer,
    an_illegal_instruction,
    a_division_by_zero,
    a_breakpoint,
    a_bus_error,
    an_exhausted_heap_in_rust,
    a_wild_jump,
    a_signal_that_code_sends_itself,
    frees_of_what_is_no_block,
    a_stack_pointer_near_the_end_of_addresses,
}

fn a_key_fault_names_everything() {
    let mut domain = domain("names");
    static TARGET: AtomicU64 = AtomicU64::new(0);
    #[inline(never)]
    fn culprit(target: *mut u64) {
        // SAFETY: deliberately unsound: the mistake under test.
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

fn maps() -> String {
    std::fs::read_to_string("/proc/self/maps").unwrap()
}

/// The contents of a library that can be loaded a second time.
fn library() -> Vec<u8> {
    let maps = maps();
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.contains("libgcc_s"));
    std::fs::read(path.unwrap()).unwrap()
}

/// Loads a library. Returns its handle, and the address of its data: the mapping whose name contains `name`.
fn load(path: &std::path::Path, name: &str) -> (*mut libc::c_void, *mut u8) {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the library is a copy of one that is loaded already.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null());
    let maps = maps();
    let data = maps.lines().find(|line| line.contains(name) && line.contains(" rw-p ")).unwrap();
    (handle, usize::from_str_radix(data.split('-').next().unwrap(), 16).unwrap() as *mut u8)
}

fn a_librarys_path_that_leads_elsewhere_is_not_read() {
    // The library's file has no name. At the violation its descriptor is a pipe.
    // SAFETY: the name is NUL-terminated.
    let file = unsafe { libc::memfd_create(c"nameless".as_ptr(), 0) };
    let path = std::path::PathBuf::from(format!("/proc/self/fd/{file}"));
    std::fs::write(&path, library()).unwrap();
    let (_, data) = load(&path, "memfd:nameless");
    let mut ends = [0; 2];
    // SAFETY: nothing else uses the descriptor.
    assert_eq!(unsafe { libc::close(file) }, 0);
    // SAFETY: the array is writable.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    assert_eq!(ends[0], file, "control: the path leads to the pipe");
    // SAFETY: the message is readable.
    assert_eq!(unsafe { libc::write(ends[1], b"hello".as_ptr().cast(), 5) }, 5);
    // SAFETY: none: this is the mistake.
    let violation = contain(&mut domain("nameless"), || unsafe { data.write_volatile(1) });
    assert_eq!(violation.target().unwrap().library(), path);
    let mut message = [0u8; 8];
    // SAFETY: the array is writable.
    assert_eq!(unsafe { libc::read(file, message.as_mut_ptr().cast(), 8) }, 5, "nothing has read the pipe");
}

fn closures_that_are_one_function_keep_their_names() {
    #[inline(never)]
    fn first(domain: &mut Domain, target: *mut u8) -> pkru_userspace::Violation {
        // SAFETY: none: this is the mistake.
        domain.call(|| unsafe { target.write_volatile(1) }).unwrap_err()
    }
    #[inline(never)]
    fn second(domain: &mut Domain, target: *mut u8) -> pkru_userspace::Violation {
        // SAFETY: none: this is the mistake.
        domain.call(|| unsafe { target.write_volatile(1) }).unwrap_err()
    }
    let mut domain = domain("same");
    let target = Box::into_raw(Box::new(0u8));
    for _ in 0..2 {
        let names = [first(&mut domain, target), second(&mut domain, target)].map(|violation| violation.to_string());
        assert!(names[0].contains("::first::") && names[1].contains("::second::"), "{names:#?}");
    }
}

fn what_a_violation_displays_is_settled_when_it_occurs() {
    let copy = std::env::temp_dir().join(format!("libsettled-{}.so", std::process::id()));
    std::fs::write(&copy, library()).unwrap();
    let (handle, data) = load(&copy, "libsettled");

    let mut domain = domain("settled");
    // SAFETY: deliberately unsound: the mistake under test.
    let write = || unsafe { data.write_volatile(1) };
    let violation = domain.call(write).unwrap_err();
    // SAFETY: nothing uses the library.
    assert_eq!(unsafe { libc::dlclose(handle) }, 0);
    std::fs::remove_file(&copy).unwrap();
    let text = violation.to_string();
    assert!(text.contains("libsettled"), "{text}");
    assert_eq!(violation.target().unwrap().library(), copy);
    let later = domain.call(write).unwrap_err();
    assert!(!later.to_string().contains("libsettled"), "control: the library is gone: {later}");
    assert_eq!(violation.to_string(), text);
}

fn a_run_past_the_end_of_the_domains_own_memory() {
    let mut domain = domain("runs");
    let run_from = |start: *mut u8| {
        for offset in 0.. {
            // SAFETY: none: this is the mistake.
            unsafe { start.wrapping_add(offset).write_volatile(7) };
        }
    };
    let heap = contain(&mut domain, || run_from(Vec::leak(vec![0u8; 64]).as_mut_ptr())).to_string();
    assert!(heap.contains("(past the end of the domain's own heap)") && !heap.contains("; if this code"), "{heap}");
}

fn a_closure_is_named() {
    let target = Box::into_raw(Box::new(0u64));
    // SAFETY: deliberately unsound: the mistake under test.
    let write = || unsafe { target.write_volatile(1) };
    let limited = Domain::builder("limited").deadline(Duration::from_secs(60));
    for mut domain in [domain("plain"), support::build(limited)] {
        let violation = domain.call(write).unwrap_err();
        let symbol = violation.symbol().expect("the test has a symbol table");
        assert!(symbol.name().unwrap().contains("a_closure_is_named"), "{symbol}");
        let text = violation.to_string();
        assert!(
            text.contains(") (the program's memory), at") && text.ends_with("or use a `Region` or a callback"),
            "{text}"
        );
        // SAFETY: the call runs in the domain, where it is stopped.
        let violation = domain.call(|| unsafe { libc::srand(1) }).unwrap_err();
        let text = violation.to_string();
        assert!(
            text.ends_with(
                "to write that static, do this outside the domain or in a callback, or make all statics writable in the \
                 domain (Globals::Writable)"
            ),
            "{text}"
        );
        let text = domain.call(|| drop(std::thread::current())).unwrap_err().to_string();
        assert!(!text.contains("warm_up"), "{text}");
    }
}

fn advice_follows_from_what_was_done() {
    static OWN: AtomicU64 = AtomicU64::new(0);
    let mut domain = domain("advised");
    let mut said = |function: &dyn Fn()| contain(&mut domain, function).to_string();
    let (arc, rc, mutex) = (Arc::new(5), Rc::new(5), Mutex::new(5));
    let counted = "as cloning or dropping an `Arc` or `Rc` does";
    for text in [said(&|| drop(black_box(arc.clone()))), said(&|| drop(black_box(rc.clone())))] {
        assert!(text.contains(counted) && !text.contains("allocate"), "{text}");
    }
    let text = said(&|| *mutex.lock().unwrap() = 6);
    assert!(text.contains("take the lock outside"), "{text}");
    let text = said(&|| OWN.store(1, Ordering::Relaxed));
    assert!(text.contains("Builder::warm_up"), "{text}");
    let text = said(&|| _ = OWN.fetch_add(1, Ordering::Relaxed));
    assert!(text.contains("Globals::Writable") && !text.contains("warm_up"), "{text}");
    // A static of another object, by a pointer that goes astray.
    // SAFETY: the name ends with a zero byte.
    let stray = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_IO_2_1_stdout_".as_ptr()) }.cast::<u64>();
    // SAFETY: none: this is the mistake.
    let text = said(&|| unsafe { black_box(stray).write_volatile(0) });
    assert!(text.contains("its pointer may be wrong") && !text.contains("Globals::Writable"), "{text}");
    assert_eq!((*mutex.lock().unwrap(), Arc::strong_count(&arc), Rc::strong_count(&rc)), (5, 1, 1));
}

fn a_null_write() {
    let mut domain = domain("null");
    let violation = contain(&mut domain, mistake);
    assert_eq!(*violation.kind(), ViolationKind::Null { address: NOWHERE as u64, access: Access::Write });
}

fn a_jump_to_nowhere() {
    let mut domain = domain("jump");
    // SAFETY: deliberately unsound: the mistake under test.
    let function = unsafe { std::mem::transmute::<usize, extern "C" fn()>(black_box(0x10)) };
    let violation = contain(&mut domain, || function());
    assert_eq!(*violation.kind(), ViolationKind::Null { address: 0x10, access: Access::Execute });
}

fn an_address_that_is_none() {
    let mut domain = domain("canonical");
    // SAFETY: deliberately unsound: the mistake under test.
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
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || unsafe { asm!("mov rsp, 64", "push rax", options(noreturn)) });
    assert!(matches!(violation.kind(), ViolationKind::Null { .. }), "{violation}");
}

fn an_illegal_instruction() {
    let mut domain = domain("illegal");
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || unsafe { asm!("ud2") });
    assert_eq!(*violation.kind(), ViolationKind::IllegalInstruction);
}

fn a_division_by_zero() {
    let mut domain = domain("divide");
    // SAFETY: deliberately unsound: the mistake under test.
    let divide = || unsafe { asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _) };
    assert_eq!(*contain(&mut domain, divide).kind(), ViolationKind::Arithmetic);
}

fn a_breakpoint() {
    let mut domain = domain("break");
    // SAFETY: deliberately unsound: the mistake under test.
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
    // SAFETY: deliberately unsound: the file was truncated, so the page has no contents.
    let violation = contain(&mut domain, || unsafe {
        black_box(page.cast::<u8>().read_volatile());
    });
    assert_eq!(*violation.kind(), ViolationKind::Bus { address: page as u64 });
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

fn a_wild_jump() {
    let mut domain = domain("jump");
    // Memory that is not executable.
    static DATA: [u8; 16] = [0xc3; 16];
    // SAFETY: deliberately unsound: the mistake under test.
    let function = unsafe { std::mem::transmute::<*const u8, extern "C" fn()>(black_box(DATA.as_ptr())) };
    let violation = contain(&mut domain, || function());
    assert_eq!(violation.access(), Some(Access::Execute), "{violation}");
}

fn a_signal_that_code_sends_itself() {
    let mut domain = domain("raise");
    // SAFETY: deliberately unsound: the mistake under test.
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
    // SAFETY: deliberately unsound: the mistake under test.
    let error = invalid_free(&mut domain, || unsafe { libc::free(foreign.cast()) });
    assert_eq!(error, HeapError::Foreign { address: foreign as usize });
    assert_eq!(*outside, 1);

    let error = invalid_free(&mut domain, || {
        // SAFETY: deliberately unsound: the mistake under test.
        unsafe {
            let block = black_box(libc::malloc(100));
            libc::free(block);
            libc::free(black_box(block));
        }
    });
    assert!(matches!(error, HeapError::DoubleFree { .. }));

    let error = invalid_free(&mut domain, || {
        // SAFETY: deliberately unsound: the mistake under test.
        unsafe { libc::free(black_box(libc::malloc(100)).byte_add(32)) };
    });
    assert!(matches!(error, HeapError::NotABlock { .. }));
    // SAFETY: deliberately unsound: the mistake under test.
    let error = invalid_free(&mut domain, || unsafe {
        libc::realloc(foreign.cast(), 100);
    });
    assert_eq!(error, HeapError::Foreign { address: foreign as usize });
}

fn a_stack_pointer_near_the_end_of_addresses() {
    static WORD: AtomicBool = AtomicBool::new(false);
    let mut domain = domain("end");
    let place = WORD.as_ptr();
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || unsafe {
        asm!("mov rsp, -3", "mov byte ptr [{}], 1", in(reg) place, options(noreturn))
    });
    assert_eq!(violation.address(), Some(place as u64));
}
