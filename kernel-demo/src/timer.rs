//! A periodic hardware interrupt: the 8254 timer by way of the 8259 interrupt controller.
//!
//! # References
//!
//! Intel 8254 and 8259A data sheets; the ports are a PC's.

use core::sync::atomic::{AtomicU64, Ordering};

use pkru::KeyRights;
use x86_64::instructions::interrupts;
use x86_64::instructions::port::Port;

use crate::fence::{self, Rights};
use crate::traps::TIMER;

static TICKS: AtomicU64 = AtomicU64::new(0);
static TICKS_IN_DOMAIN: AtomicU64 = AtomicU64::new(0);

/// Returns how many ticks there were, and how many of them struck in a domain.
pub fn ticks() -> (u64, u64) {
    (TICKS.load(Ordering::Relaxed), TICKS_IN_DOMAIN.load(Ordering::Relaxed))
}

/// Handles a tick, with the kernel's rights; `rights` are those it interrupted.
pub(crate) fn tick(rights: Rights) {
    assert_eq!(
        fence::read(),
        Rights { pkru: KeyRights::ALL, pkrs: KeyRights::ALL },
        "a handler has the kernel's rights"
    );
    TICKS.fetch_add(1, Ordering::Relaxed);
    if rights != fence::read() {
        TICKS_IN_DOMAIN.fetch_add(1, Ordering::Relaxed);
    }
    write(0x20, 0x20); // end of interrupt
}

fn write(port: u16, value: u8) {
    // SAFETY: the ports are those of the interrupt controllers and the timer, which only this module uses.
    unsafe { Port::new(port).write(value) };
}

/// Starts ticking, 1,000 times a second, and enables interrupts.
pub fn start() {
    const DIVISOR: u16 = 1193;
    // Initialise both controllers: vectors from `TIMER`, cascade on line 2, 8086 mode; then mask all but the timer.
    for (port, value) in
        [(0x20, 0x11), (0xa0, 0x11), (0x21, TIMER), (0xa1, TIMER + 8), (0x21, 4), (0xa1, 2), (0x21, 1), (0xa1, 1)]
    {
        write(port, value);
    }
    write(0x21, 0xfe);
    write(0xa1, 0xff);
    // Channel 0, both bytes, rate generator.
    write(0x43, 0x34);
    write(0x40, DIVISOR.to_le_bytes()[0]);
    write(0x40, DIVISOR.to_le_bytes()[1]);
    interrupts::enable();
}

/// Disables interrupts.
pub fn stop() {
    interrupts::disable();
}
