// Answers each line with its number on the connection, and sends `tick N` every 20 ms. Writes its
// port to the file that its argument names.
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

func serve(connection net.Conn) {
	var lock sync.Mutex
	say := func(text string) {
		lock.Lock()
		defer lock.Unlock()
		fmt.Fprintln(connection, text)
	}
	done := make(chan bool)
	go func() {
		ticker := time.NewTicker(20 * time.Millisecond)
		defer ticker.Stop()
		for number := 1; ; number++ {
			select {
			case <-ticker.C:
				say(fmt.Sprintf("tick %d", number))
			case <-done:
				return
			}
		}
	}()
	lines := bufio.NewScanner(connection)
	for number := 1; lines.Scan(); number++ {
		say(fmt.Sprintf("%d %s", number, lines.Text()))
	}
	close(done)
	connection.Close()
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	path := os.Args[1]
	port := fmt.Sprint(listener.Addr().(*net.TCPAddr).Port)
	if err := os.WriteFile(path+".new", []byte(port), 0600); err != nil {
		panic(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		panic(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go serve(connection)
	}
}
