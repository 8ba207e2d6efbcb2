//! A program whose thread-locals need more room than a domain has by default.

use std::cell::Cell;
use std::hint::black_box;

use pkru_userspace::{Domain, Error};
use support::{contain, mistake, suite, works};

suite! { thread_locals_larger_than_the_default }

const SIZE: usize = 512 * 1024;

thread_local! { static LARGE: Cell<[u8; SIZE]> = const { Cell::new([3; SIZE]) } }

fn thread_locals_larger_than_the_default() {
    let sum = || LARGE.with(|bytes| black_box(bytes.get()).iter().map(|byte| u64::from(*byte)).sum::<u64>());
    assert_eq!(sum(), 3 * SIZE as u64, "control");
    let error = Domain::builder("small").build().unwrap_err();
    let Error::ThreadLocals { needed, limit } = error else { panic!("{error}") };
    assert!(needed > SIZE && limit < SIZE && error.to_string().contains("thread_locals_size"), "{error}");

    let mut domain = Domain::builder("large").stack_size(8 << 20).thread_locals_size(needed).build().unwrap();
    assert_eq!(domain.call(sum).unwrap(), 3 * SIZE as u64);
    domain.call(|| LARGE.with(|bytes| bytes.set([4; SIZE]))).unwrap();
    assert_eq!(domain.call(sum).unwrap(), 4 * SIZE as u64);
    contain(&mut domain, mistake);
    assert_eq!(domain.call(sum).unwrap(), 3 * SIZE as u64, "a discard restores them");
    works(&mut domain);
    assert_eq!(sum(), 3 * SIZE as u64);
}
