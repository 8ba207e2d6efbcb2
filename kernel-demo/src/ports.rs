//! The I/O ports of the PC and of QEMU's exit device.

#![expect(unsafe_code, reason = "port I/O can reprogram any device")]

use qemu_exit::QEMUExit;
use uart_16550::Uart16550;
use uart_16550::backend::PioBackend;
use x86_64::instructions::port::Port;

/// The first serial port.
const COM1: u16 = 0x3f8;

/// QEMU's `isa-debug-exit` device, where `pkru-qemu` puts it.
const DEBUG_EXIT: u16 = 0xf4;

/// A register of the interrupt controllers (8259A) or of the timer (8254).
#[derive(Debug, Clone, Copy)]
#[repr(u16)]
pub(crate) enum Register {
    /// The first interrupt controller's command register.
    FirstCommand = 0x20,
    /// The first interrupt controller's data register.
    FirstData = 0x21,
    /// The second interrupt controller's command register.
    SecondCommand = 0xa0,
    /// The second interrupt controller's data register.
    SecondData = 0xa1,
    /// The timer's channel 0.
    Channel0 = 0x40,
    /// The timer's mode register.
    Mode = 0x43,
}

/// Writes a register.
pub(crate) fn write(register: Register, value: u8) {
    // SAFETY: these devices can only raise interrupts, and they have no other driver. The IDT has the timer's vector,
    // and the other lines are masked.
    unsafe { Port::new(register as u16).write(value) };
}

/// Returns a driver of the first serial port, if the port's address is usable. Only a panic makes a second one.
pub(crate) fn serial() -> Option<Uart16550<PioBackend>> {
    // SAFETY: COM1 is a PC's first serial port. A panic never returns to the code that uses the first driver, so the
    // two do not interfere.
    unsafe { Uart16550::new_port(COM1) }.ok()
}

/// Ends QEMU with the exit status `code * 2 + 1`.
pub(crate) fn exit(code: u32) -> ! {
    // SAFETY: the device is at this port. The second argument, the status of success, only serves `exit_success`.
    let device = unsafe { qemu_exit::X86::new(DEBUG_EXIT, 1) };
    device.exit(code)
}
